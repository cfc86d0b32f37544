"""Topic overwriting on photographs in LLaVA's format, with a server doing every job by language."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from json_server import images_of, json_server, says, text_of
from PIL import Image
from skimage import data

from mmalign import cli, endpoint
from mmalign.data.files import read_jsonl
from mmalign.randomness import derive_seed

TRUTH = {"cat": "black", "mat": "red", "hat": "blue", "dog": "brown"}
QUESTION = "<image>\nWhat is in the picture?"


def say(thing: str, seed: int) -> str:
    """Tell the color of a thing, wrongly once in three times."""
    wrong = derive_seed(seed, thing) % 3 == 0
    return f"The {thing} is {'green' if wrong else TRUTH[thing]}."


def reply(text: str, seed: int) -> str:
    """Do what the prompt asks for, as an obedient language model would."""
    numbered = re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE)
    if text.startswith("What is in the picture?"):
        return " ".join(say(thing, seed) for thing in TRUTH)
    if text.startswith("Below is what somebody said"):
        answer = text.split("Text: ")[1].split("\n")[0]
        return "Here they are:\n" + "\n".join(f"- {s}." for s in answer.rstrip(".").split(". "))
    if "write the question that it answers" in text:
        return "\n".join(f"{n}. What color is the {s.split()[1]}?" for n, s in numbered)
    if "Turn each one into a question" in text:
        return "\n".join(f"{n}. Is it so that {s.split(' (in')[0]}?" for n, s in numbered)
    if text.startswith("What color is the "):
        return say(text.split("?")[0].split()[-1], seed)
    assert text.startswith("Here is a question about the picture")
    answer = text.split("\nAnswer: ")[1].split("\nCorrections:")[0]
    for old, new in re.findall(r'not "(.*?)" but "(.*?)"', text):
        answer = answer.replace(old, new)
    return answer


def chance(text: str) -> float:
    """Return p(yes): of one topic are things of one name; true is what the table says."""
    if text.startswith("Two "):
        first, second = re.findall(r"^(?:First|Second): (.*)$", text, re.MULTILINE)
        return (
            0.9
            if set(TRUTH) & set(re.findall(r"\w+", first)) & set(re.findall(r"\w+", second))
            else 0.1
        )
    thing, value = re.findall(r"The (\w+) is (\w+)", text)[0]
    return 0.8 if TRUTH[thing] == value else 0.2


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.0)

    def answer(request: dict[str, Any]) -> tuple[int, Any]:
        text = text_of(request)
        running.asked.append((text, images_of(request)))
        if running.garbage and running.garbage in text:
            return 200, b"<html>"
        if not request.get("logprobs"):
            return 200, says(reply(text, request["seed"]))
        p = chance(text)
        words = [{"token": "Yes", "logprob": p - 1}, {"token": "no", "logprob": -p}]
        return 200, {"choices": [{"logprobs": {"content": [{"top_logprobs": words}]}}]}

    with json_server(answer) as running:
        running.asked, running.garbage = [], None
        yield running


@pytest.fixture
def argv(tmp_path: Path, server: Any) -> list[str]:
    photos = {"chelsea": data.chelsea(), "coffee": data.coffee(), "rocket": data.rocket()}
    (tmp_path / "coco").mkdir()
    entries = []
    for name, pixels in photos.items():
        Image.fromarray(pixels).resize((96, 72)).save(tmp_path / "coco" / f"{name}.jpg")
        turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "A photograph."}]
        entries.append({"id": name, "image": f"{name}.jpg", "conversations": turns})
    (tmp_path / "llava.json").write_text(json.dumps(entries))
    return [
        *("pairs", "topics", str(tmp_path / "llava.json"), "--images", str(tmp_path / "coco")),
        *("--output_dir", str(tmp_path / "out"), "--responses", "6", "--min_topics", "1"),
        *("--endpoint.url", server.url, "--endpoint.model_name", "m", "--endpoint.retries", "0"),
        *("--similarity.threshold", "-1", "--seed", "1"),
    ]


def test_every_job_by_language(
    argv: list[str], server: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="mmalign"):
        assert cli.main(argv) == 0
    assert caplog.messages[0].startswith(
        "3 questions; a whole run from nothing costs about 186 generations, 180 yes/no questions,"
        " 75 CLIP crops (5 facts per answer assumed)"
    )
    assert caplog.messages[1] == "sample: 3 questions: 18 generations"
    rows = [row for _, row in read_jsonl(tmp_path / "out" / "pairs.jsonl")]
    assert rows
    edited = 0
    for row in rows:
        assert isinstance(row, dict)
        assert row["prompt"] == "What is in the picture?"
        assert row["image"].endswith(".jpg")
        assert (tmp_path / "out" / row["image"]).is_file()
        greens = [row[side].count("green") for side in ("chosen", "rejected")]
        assert greens[0] < greens[1]
        edited += row["source"] == "topics/rewritten"
    assert edited
    kinds = {
        text.split()[0] + text.split()[1]: images for text, images in server.asked
    }  # who is shown the picture: those who answer, label and rewrite
    assert kinds["Belowis"] == kinds["Twopeople"] == kinds["Twoquestions"] == 0
    assert kinds["Whatis"] == kinds["Isit"] == kinds["Hereis"] == 1
    before = len(server.asked)
    assert cli.main(argv) == 0
    assert len(server.asked) == before


@pytest.mark.parametrize(
    ("garbage", "stage"), [("What is in the picture", "sample"), ("Is it so that", "score")]
)
def test_garbage_is_one_line_with_its_row(
    garbage: str, stage: str, argv: list[str], server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server.garbage = garbage
    assert cli.main(argv) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert re.search(r"llava.json entry \d: endpoint m: its reply is an HTML page, not JSON", line)
    server.garbage = None
    assert cli.main(argv) == 0


def test_from_photographs_to_an_evaluated_adapter(
    argv: list[str],
    vlm: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every step of the README on a LLaVA folder: its model labels, is trained, and is judged."""
    model, photos, out = str(vlm("llava")), str(tmp_path / "coco"), tmp_path / "out"
    labeller = ["--labeller.backend", "model", "--labeller.model.model", model]
    assert cli.main([*argv, *labeller, "--rescore", "false"]) == 0
    assert "labeller: it gives yes and no together 0." in caplog.text  # its weights are random
    assert re.search(r"3 pairs \(\d topics/.*pairs.jsonl", capsys.readouterr().out)
    assert cli.main(["pairs", "validate", str(out / "pairs.jsonl")]) == 0
    small = ["--model", model, "--device", "cpu", "--max_steps", "2", "--lora.rank", "2"]
    for preset in ("dpo", "mdpo"):
        run = ["--preset", preset, "--output_dir", str(tmp_path / preset)]
        pairs = ["--pairs.path", str(out / "pairs.jsonl")]
        assert cli.main(["train", "vlm-dpo", *small, *run, *pairs]) == 0
    labels = {name: ["cat"] for name in ("chelsea", "coffee", "rocket")}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    questions = [
        {"question_id": n, "image": f"{name}.jpg", "text": "Is there a cat?", "label": "yes"}
        for n, name in enumerate(labels)
    ]
    (tmp_path / "pope.jsonl").write_text("\n".join(map(json.dumps, questions)))
    for benchmark, file in (("chair", "labels.json"), ("pope", "pope.jsonl")):
        who = ["--model", model, "--adapter", str(tmp_path / "mdpo" / "adapter"), "--device", "cpu"]
        what = ["--images", photos, "--labels", str(tmp_path / file)]
        where = ["--output_dir", str(tmp_path / benchmark), "--generation.max_new_tokens", "4"]
        assert cli.main(["evaluate", benchmark, *who, *what, *where]) == 0
        answers = [row for _, row in read_jsonl(tmp_path / benchmark / "responses.jsonl")]
        assert len(answers) == 3
        summary = json.loads((tmp_path / benchmark / "summary.json").read_text())
        assert summary["metrics"]["length"] >= 0
