"""Preferences between answers, in every layout people have them in."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from skimage import data as photographs

from mmalign.cli import main
from mmalign.config import VlmPairsConfig
from mmalign.data.images import open_image
from mmalign.data.vlm_readers import read_vlm_pairs, validate_vlm_pairs
from mmalign.data.vlm_source import has_answers
from mmalign.types import InputError, VlmPair

NAMES = ("astronaut", "coffee", "chelsea")


def photo(name: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(getattr(photographs, name)()).convert("RGB").resize((24, 16)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / f"{name}.png").write_bytes(photo(name))
    return tmp_path


def flat(i: int, **more: Any) -> dict[str, Any]:
    row = {
        "image": f"{NAMES[i]}.png",
        "prompt": f"<image>\nWhat is {i}?",
        "chosen": f"A {i}.",
        "rejected": f"No {i}.",
    }
    return {**row, **more}


def message(role: str, content: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


def blocks(text: str, images: int) -> list[dict[str, str]]:
    return [{"type": "image"}] * images + [{"type": "text", "text": text}]


LAYOUTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "vlm": flat,
    "vlm, list": lambda i: {**flat(i), "image": None, "images": [f"{NAMES[i]}.png"]},
    "vlm, question": lambda i: {
        "question": f"What is {i}?",
        **{k: v for k, v in flat(i).items() if k != "prompt"},
    },
    "trl": lambda i: {
        "images": [f"{NAMES[i]}.png"],
        "prompt": message("user", blocks(f"What is {i}?", 1)),
        "chosen": message("assistant", blocks(f"A {i}.", 0)),
        "rejected": message("assistant", f"No {i}."),
    },
    "rlhf_v": lambda i: {
        "image": f"{NAMES[i]}.png",
        "text": json.dumps(
            {"question": f"What is {i}?", "chosen": f"A {i}.", "rejected": f"No {i}."}
        ),
    },
    "swift": lambda i: {
        "messages": message("user", f"<image>What is {i}?") + message("assistant", f"A {i}."),
        "rejected_response": f"No {i}.",
        "images": [f"{NAMES[i]}.png"],
    },
    "llava": lambda i: {
        "id": str(i),
        "image": f"{NAMES[i]}.png",
        "conversations": [
            {"from": "human", "value": f"<image>\nWhat is {i}?"},
            {"from": "gpt", "value": f"A {i}."},
        ],
        "rejected": {"from": "gpt", "value": f"No {i}."},
    },
}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, **more: Any) -> list[VlmPair]:
    return list(read_vlm_pairs(VlmPairsConfig(path=str(path), **more)).pairs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_every_layout_in_every_file(layout: str, suffix: str, folder: Path) -> None:
    rows = [LAYOUTS[layout](i) for i in range(3)]
    file = folder / f"pairs{suffix}"
    if suffix == ".jsonl":
        write_jsonl(file, rows)
    elif suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)
    assert has_answers(str(file))
    pairs = read(file)
    assert [p.prompt for p in pairs] == ["What is 0?", "What is 1?", "What is 2?"]
    assert [p.chosen for p in pairs] == ["A 0.", "A 1.", "A 2."]
    assert [p.rejected for p in pairs] == ["No 0.", "No 1.", "No 2."]
    for pair, name in zip(pairs, NAMES, strict=True):
        (image,) = pair.images
        assert (
            open_image(image, max_pixels=999).tobytes()
            == Image.open(io.BytesIO(photo(name))).tobytes()
        )
    assert read(folder)[0].pair_id == pairs[0].pair_id
    assert len({pair.pair_id for pair in pairs}) == 3


@pytest.mark.parametrize("layout", ["vlm", "trl", "rlhf_v"])
def test_pictures_inside_parquet_files(layout: str, folder: Path) -> None:
    key = "images" if layout == "trl" else "image"
    rows = []
    for i in range(3):
        cell = {"bytes": photo(NAMES[i]), "path": "/elsewhere/a.png"}
        rows.append({**LAYOUTS[layout](i), key: [cell] if layout == "trl" else cell})
    pq.write_table(pa.Table.from_pylist(rows), folder / "p.parquet", row_group_size=2)
    table = read_vlm_pairs(VlmPairsConfig(path=str(folder / "p.parquet")))
    for i in (2, 0, 1, 0):
        assert table.pairs[i].images[0].data == photo(NAMES[i])
        assert table.pairs[i].prompt == f"What is {i}?"


def test_several_pictures_and_frames(folder: Path) -> None:
    (folder / "clip").mkdir()
    for number, name in enumerate(NAMES):
        (folder / "clip" / f"{number}.png").write_bytes(photo(name))
    rows = [
        flat(0, image=None, images=["coffee.png", "chelsea.png"], prompt="<image><image> Same?"),
        {"video": "clip", "prompt": "<video>\nWhat moves?", "chosen": "A", "rejected": "B"},
        {"prompt": "No picture?", "chosen": "Yes", "rejected": "No"},
    ]
    pairs = read(write_jsonl(folder / "p.jsonl", rows))
    assert [len(pair.images) for pair in pairs] == [2, 3, 0]
    assert [pair.prompt for pair in pairs] == ["Same?", "What moves?", "No picture?"]
    assert pairs[1].images[2].where.endswith("2.png")


BAD: list[tuple[dict[str, Any], str]] = [
    (flat(1, prompt="<image><image> two?"), "2 <image> for 1 images"),
    (flat(1, image=None), "1 <image> for 0 images"),
    (flat(1, image="cut.png"), "image 1: not an image of an allowed format"),
    (flat(1, image="missing.png"), "does not exist"),
    (flat(1, image="../secret.png"), "'..' is not allowed"),
    (flat(1, image="/etc/passwd"), "must be relative"),
    (flat(1, image="link.png"), "is a link out of"),
    (flat(1, image=7), "an image cell is a int"),
    (flat(1, chosen="  "), "chosen is empty"),
    (flat(1, chosen=None), "chosen is empty"),
    (flat(1, rejected=""), "rejected is empty"),
    (flat(1, rejected=" A 1. "), "the same text"),
    (flat(1, prompt="<image>"), "the prompt is empty"),
    (flat(1, rejected="<image> B"), "rejected has a placeholder"),
    (flat(1, rejected=["B"]), "rejected is a list, not a text"),
    (flat(1, chosen="\ud800"), "not valid Unicode"),
    (flat(1, score_chosen="high"), "not a number"),
    (flat(1, rejected_images=["coffee.png"]), "both answers must be about the same images"),
    ({k: v for k, v in flat(1).items() if k != "rejected"}, "'rejected' is missing"),
    (flat(0), "the same pair as"),
    (flat(1, video="clip"), "is not a folder of frames"),
    (flat(1, video="../clip"), "leaves"),
    (flat(1, image=None, prompt="x", images=["coffee.png"] * 65), "more than max_images 64"),
]


@pytest.mark.parametrize(("row", "problem"), BAD, ids=[problem for _, problem in BAD])
def test_bad_rows_are_named(row: dict[str, Any], problem: str, folder: Path) -> None:
    (folder.parent / "secret.png").write_bytes(photo("coffee"))
    os.symlink(folder.parent / "secret.png", folder / "link.png")
    (folder / "cut.png").write_bytes(b"\x89PNG")
    file = write_jsonl(folder / "p.jsonl", [flat(0), row, flat(2)])
    with pytest.raises(InputError, match=r"p\.jsonl line 2: ") as caught:
        read(file)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    table = read_vlm_pairs(VlmPairsConfig(path=str(file), on_bad_row="skip"))
    assert [pair.chosen for pair in table.pairs] == ["A 0.", "A 2."]
    assert len(table.bad_rows) == 1
    report = validate_vlm_pairs(str(file), max_pixels=999)
    assert (report.rows, len(report.bad_rows)) == (3, 1)


@pytest.mark.parametrize(
    ("layout", "change", "problem"),
    [
        ("trl", {"prompt": message("user", blocks("x", 2))}, "2 blocks of type image for 1"),
        ("trl", {"prompt": message("system", "x")}, "message of 'system'"),
        ("trl", {"chosen": message("user", "x")}, "message of 'user', not of assistant"),
        ("trl", {"prompt": message("user", "x") * 2}, "2 messages where one is wanted"),
        ("swift", {"messages": message("user", "x")}, "messages has 0 messages"),
        ("rlhf_v", {"text": "{"}, "text is not JSON"),
        ("rlhf_v", {"text": "[]"}, "text is a JSON list"),
        ("llava", {"conversations": "x"}, "conversations is a str, not a list"),
    ],
)
def test_bad_messages_are_named(
    layout: str, change: dict[str, Any], problem: str, folder: Path
) -> None:
    rows = [LAYOUTS[layout](0), {**LAYOUTS[layout](1), **change}]
    with pytest.raises(InputError, match=r"line 2: ") as caught:
        read(write_jsonl(folder / "p.jsonl", rows))
    assert problem in str(caught.value)


@pytest.mark.parametrize("layout", ["swift", "llava", "rlhf_v"])
def test_missing_rejected_is_said(layout: str, folder: Path) -> None:
    row = LAYOUTS[layout](0)
    row.pop("rejected_response", None)
    row.pop("rejected", None)
    if layout == "rlhf_v":
        row["text"] = json.dumps({"question": "What?", "chosen": "A"})
    with pytest.raises(InputError, match="line 1: 'rejected"):
        read(write_jsonl(folder / "p.jsonl", [row]))


def test_parquet_text_that_is_not_utf8(folder: Path) -> None:
    pq.write_table(pa.Table.from_pylist([flat(0, chosen="unreadable")]), folder / "p.parquet")
    data = (folder / "p.parquet").read_bytes()
    (folder / "p.parquet").write_bytes(data.replace(b"unreadable", b"un\xffeadable"))
    with pytest.raises(InputError, match=r"p\.parquet: not a readable .* of column 'chosen'"):
        read(folder / "p.parquet")


def test_ties_are_dropped_and_counted(folder: Path) -> None:
    rows = [flat(0, score_chosen=1, score_rejected=1), flat(1, score_chosen=2, score_rejected=1)]
    table = read_vlm_pairs(VlmPairsConfig(path=str(write_jsonl(folder / "p.jsonl", rows))))
    assert (table.ties, len(table.pairs), table.pairs[0].margin) == (1, 1, 1)


def test_images_may_lie_elsewhere(folder: Path) -> None:
    (folder / "rows").mkdir()
    file = write_jsonl(folder / "rows" / "metadata.jsonl", [flat(0)])
    with pytest.raises(InputError, match="does not exist"):
        read(file)
    assert len(read(folder / "rows", images=str(folder))) == 1
    with pytest.raises(InputError, match="images: no such folder"):
        read(file, images=str(folder / "nowhere"))


def test_foreign_formats_are_refused(folder: Path) -> None:
    file = write_jsonl(folder / "p.jsonl", [{"chosen_file_name": "a", "rejected_file_name": "b"}])
    assert not has_answers(str(file))
    with pytest.raises(InputError, match="no pairs of answers: a row needs"):
        read(file)
    rows = [{"prompt": "x", "chosen": photo("coffee"), "rejected": photo("chelsea")}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "images.parquet")
    assert not has_answers(str(folder / "images.parquet"))
    (folder / "x.json").write_text("{")
    with pytest.raises(InputError, match=r"x\.json: is not JSON"):
        read(folder / "x.json")


def test_validate_lists_without_torch(folder: Path) -> None:
    (folder / "cut.png").write_bytes(photo("coffee")[:200])
    file = write_jsonl(folder / "p.jsonl", [flat(0), flat(1, image="cut.png"), flat(2)])
    code = (
        "import sys; from mmalign.cli import main;"
        f"code = main(['pairs', 'validate', '--path', {str(file)!r}]);"
        "heavy = {'torch', 'transformers', 'open_clip', 'diffusers'} & set(sys.modules);"
        "assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "p.jsonl line 2: image 1: the image" in done.stdout
    assert "3 rows: 2 good, 0 ties, 1 bad (0 duplicates)" in done.stdout


def test_stats_count_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [flat(i, score_chosen=2 + i, score_rejected=1, source="people") for i in range(3)]
    file = write_jsonl(folder / "p.jsonl", rows)
    assert main(["pairs", "stats", f"--path={file}", f"--output={folder / 'gaps.png'}"]) == 0
    assert "gaps      3 known" in capsys.readouterr().out
