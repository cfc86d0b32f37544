"""Row 8: bad rows."""

from __future__ import annotations

from pathlib import Path

from .harness import Tally, case, mmalign
from .inputs import (
    Change,
    change_line,
    file_of_answers,
    folder_of_pairs,
    refused_everywhere,
    three_commands,
)

LISTED = "listed with its line; stop, or skip and count"
BadRows = dict[str, tuple[Change, str]]
BAD_ROWS: BadRows = {
    "missing column": ({"rejected_file_name": "DROP"}, "'rejected_file_name' is missing"),
    "empty prompt": ({"prompt": " "}, "the prompt is empty"),
    "prompt of another type": ({"prompt": 7}, "the prompt is a int"),
    "chosen is rejected": ({"rejected_file_name": "1_0.png"}, "same image"),
    "copy of the chosen image": ({"rejected_file_name": "copy.png"}, "same image"),
    "duplicate pair": (
        {"prompt": "red 0", "chosen_file_name": "0_0.png", "rejected_file_name": "0_1.png"},
        "the same pair as",
    ),
    "missing file": ({"chosen_file_name": "no.png"}, "does not exist"),
    "broken JSON": ('{"prompt": "red 1", ', "not JSON"),
    "JSON that is no object": ("[1, 2]", "not an object"),
    "deep JSON": ("[" * 100_000, "not usable JSON"),
    "NaN score": ({"score_chosen": float("nan")}, "not a finite number"),
    "margin that contradicts": (
        {"score_chosen": 1, "score_rejected": 0, "margin": 3},
        "margin 3 is not",
    ),
    "lone surrogate": (
        '{"prompt": "\\ud800", "chosen_file_name": "1_0.png", "rejected_file_name": "1_1.png"}',
        "lone surrogate",
    ),
}


BAD_ANSWERS: BadRows = {
    "missing column": ({"rejected": "DROP"}, "'rejected' is missing"),
    "empty prompt": ({"prompt": " "}, "the prompt is empty"),
    "empty answer": ({"chosen": ""}, "chosen is empty"),
    "answer of another type": ({"chosen": 7}, "chosen is a int"),
    "chosen is rejected": ({"chosen": "Yes.", "rejected": "Yes. "}, "are the same text"),
    "duplicate pair": (
        {"image": "red.png", "chosen": "A red circle 0.", "rejected": "No blue square 0."},
        "the same pair as",
    ),
    "missing file": ({"image": "no.png"}, "does not exist"),
    "image of another type": ({"image": 7}, "an image cell is a int"),
    "too many images": ({"image": ["red.png"] * 65}, "more than max_images"),
    "broken JSON": ('{"prompt": "red 1", ', "not JSON"),
    "JSON that is no object": ("[1, 2]", "not an object"),
    "deep JSON": ("[" * 100_000, "not usable JSON"),
    "NaN score": ({"score_chosen": float("nan")}, "not a finite number"),
    "placeholder in an answer": ({"chosen": "A <image> of red"}, "placeholder"),
    "lone surrogate": ({"chosen": "\ud800"}, "lone surrogate"),
}


@case(8, "rows that cannot be used", LISTED, limit=300)
def bad_rows(folder: Path, tally: Tally) -> None:
    """Every kind of bad row, in validate and in training."""
    for name, (change, words) in BAD_ROWS.items():
        place = folder / name.replace(" ", "-")
        pairs = _with_copy(place / "pairs")
        change_line(pairs, 1, change)
        refused_everywhere(pairs, place / "run", "line 2", words, tally)


def _with_copy(folder: Path) -> Path:
    pairs = folder_of_pairs(folder)
    (pairs / "copy.png").write_bytes((pairs / "1_0.png").read_bytes())
    return pairs


@case(8, "rows of answers that cannot be used", LISTED, limit=300)
def bad_answers(folder: Path, tally: Tally) -> None:
    """Every kind of bad row in pairs of answers about images."""
    for name, (change, words) in BAD_ANSWERS.items():
        place = folder / name.replace(" ", "-")
        pairs = file_of_answers(place / "pairs")
        change_line(pairs, 1, change)
        refused_everywhere(pairs, place / "run", "line 2", words, tally)


@case(8, "all of them at once", "validate lists every one with its line", quick=True)
def all_bad_rows(folder: Path, tally: Tally) -> None:
    """One file with every kind."""
    pairs = _with_copy(folder / "pairs")
    file = pairs / "metadata.jsonl"
    second = file.read_text().splitlines()[1]
    for number, (change, _) in enumerate(BAD_ROWS.values()):
        with file.open("a") as stream:
            stream.write(second + "\n")
        change_line(pairs, 4 + number, change)
    said = mmalign("pairs", "validate", str(pairs))
    for number, (name, (_, words)) in enumerate(BAD_ROWS.items()):
        line = f"line {5 + number}"
        found = [text for text in said.text.splitlines() if f"{line}:" in text]
        tally.point(len(found) == 1 and words in found[0], f"{name}: {found}")
    tally.point(said.refuses(f"{len(BAD_ROWS)} bad rows"), said.error)


@case(8, "ties, byte order mark, UTF-16", "ties counted, mark read, UTF-16 refused in one line")
def ties_and_encodings(folder: Path, tally: Tally) -> None:
    """What is no bad row, and what is no row at all."""
    kinds = (folder_of_pairs(folder / "pairs"), file_of_answers(folder / "answers"))
    for number, pairs in enumerate(kinds):
        change_line(pairs, 1, {"score_chosen": 1.0, "score_rejected": 1.0})
        validate, stop, skip = three_commands(pairs, folder / str(number) / "run")
        tally.point(validate.code == 0 and " 1 ties" in validate.text, validate.error)
        for said in (stop, skip):
            tally.point(said.code == 0 and "1 ties dropped" in said.text, said.error)
        file = pairs if pairs.is_file() else pairs / "metadata.jsonl"
        text = file.read_text()
        file.write_text(text, encoding="utf-8-sig")
        said = mmalign("pairs", "validate", str(pairs))
        tally.point(said.code == 0 and " 1 ties" in said.text, said.error)
        for encoding in ("utf-16", "utf-16-le"):
            file.write_text(text, encoding=encoding)
            for said in three_commands(pairs, folder / "no" / "run"):
                tally.refused(said, "UTF-16")
