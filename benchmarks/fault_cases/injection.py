"""Row 12: text that would run in a page or steer a terminal."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
from pathlib import Path

from .harness import Tally, case, mmalign
from .inputs import folder_of_pairs
from .toys import TOYS, write_lines

HTML = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
TERMINAL = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x08\x7f\u202e\u200b"


class _Tags(html.parser.HTMLParser):
    """Collects tags and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Remember what could run."""
        names = [name for name, _ in attributes]
        if any(name.startswith("on") for name in names) or ("src", "x") in attributes:
            self.found.append(f"{tag} {names}")

    def handle_data(self, data: str) -> None:
        """Remember scripts that were not ours."""
        if self.cdata_elem == "script" and "alert(" in data:
            self.found.append("script")


def _clean(text: str) -> bool:
    return not any((ord(c) < 32 and c not in "\n\r\t") or c == "\x7f" for c in text)


@case(12, "prompts and names in the report, the model card and the log", "escaped everywhere")
def run_of_strangers(folder: Path, tally: Tally) -> None:
    """Train and evaluate with a model, prompts and pairs that all carry injections."""
    model = folder / "model<script>alert(1)<!--"
    shutil.copytree(TOYS.sd, model)
    prompts = folder / "prompts.jsonl"
    write_lines(prompts, [{"prompt": HTML}, {"prompt": f"red {TERMINAL}"}])
    output = folder / "run"
    argv = TOYS.train("d3po", output, f"--model={model}", f"--prompts={prompts}", "--max_steps=2")
    evaluation = (f"--evaluation.prompts={prompts}", "--evaluation.images_per_prompt=1")
    rewards = '--evaluation.rewards=[{"name": "brightness"}]'
    said = mmalign(*argv, *evaluation, rewards)
    tally.point(said.code == 0, said.error)
    for page in (output / "report.html", output / "README.md"):
        found = _Tags(page.read_text()).found
        tally.point(not found, f"{page.name}: {found}")
    tally.point(_clean(said.text), "control characters reach the terminal")
    card = (output / "README.md").read_text()
    tally.point("\x1b" not in card, "control characters in the card")
    tally.answers.append("report.html, README.md and terminal clean")


@case(12, "names of files and ids in error messages", "one line without control characters")
def names_in_errors(folder: Path, tally: Tally) -> None:
    """File names, ids, columns and JSON keys that would steer a terminal."""
    pairs = folder_of_pairs(folder / "pairs")
    lines = (pairs / "metadata.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    for change in (
        {"chosen_file_name": f"{TERMINAL}.png"},
        {"score_chosen": TERMINAL},
        {f"{TERMINAL}chosen_file_name": "x", "chosen_file_name": None},
        {"pair_id": TERMINAL, "prompt": ""},
    ):
        write_lines(pairs / "metadata.jsonl", [{**row, **change}])
        for argv in (
            ["pairs", "validate", str(pairs)],
            TOYS.train("mapo", folder / "run", f"--pairs.path={pairs}"),
        ):
            said = mmalign(*argv)
            tally.point(said.code == 2 and _clean(said.text), said.error)
    tally.answers = ["escaped or blanked"]


@case(12, "answers in the benchmark pages", "escaped")
def benchmark_pages(folder: Path, tally: Tally) -> None:
    """Answers of a model under evaluation carry the injection."""
    answers, labels = folder / "answers.jsonl", folder / "labels.json"
    write_lines(answers, [{"question": f"Is there a cat? {HTML}", "answer": f"no {HTML}"}] * 2)
    rows = [
        {
            "question_id": n,
            "image": f"{HTML}.jpg",
            "text": f"Is there a cat? {HTML}",
            "label": "yes",
        }
        for n in (1, 2)
    ]
    write_lines(labels, rows)
    argv = ["evaluate", "pope", f"--responses={answers}", f"--labels={labels}"]
    said = mmalign(*argv, f"--output_dir={folder / 'out'}")
    tally.point(said.code == 0, said.error)
    for page in (folder / "out").glob("*.html"):
        found = _Tags(page.read_text()).found
        tally.point(not found, f"{page.name}: {found}")
    tally.answers.append("report.html clean")


@case(12, "spreadsheet and Markdown of reports", "no link or image of a stranger's", quick=True)
def markdown(folder: Path, tally: Tally) -> None:
    """Model names in the card are shown as code or escaped."""
    name = "x](javascript:alert(1)) ![a](http://127.0.0.1/a.png)"
    model = folder / name.replace("/", "-")
    shutil.copytree(TOYS.sd, model)
    output = folder / "run"
    said = mmalign(*TOYS.train("mapo", output, f"--model={model}", "--max_steps=1"))
    card = (output / "README.md").read_text() if said.code == 0 else said.error
    links = re.findall(r"(?<!\\)\]\((?:javascript|http)[^)]*\)", _without_code(card))
    tally.point(said.code == 0 and not links, f"{said.code} {links}")


def _without_code(text: str) -> str:
    text = text.split("\n---\n", 1)[-1]  # what comes before is YAML
    return re.sub(r"(`+)[^`].*?\1", "", re.sub(r"```.*?```", "", text, flags=re.S))
