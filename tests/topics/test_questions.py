from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmalign.config import TopicOverwriteConfig
from mmalign.topics.questions import read_questions
from mmalign.types import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 6), (40 * number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


def table(folder: Path, *rows: dict[str, Any] | str) -> str:
    path = folder / "questions.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def read(source: str | Path, **options: Any) -> Any:
    return read_questions(TopicOverwriteConfig(questions=str(source), **options))


def test_lines_name_images_and_may_name_questions(folder: Path) -> None:
    source = table(
        folder,
        {"image": "images/0.png", "prompt": "<image>\nWhat is it?", "id": 7},
        {"file_name": "images/1.png", "question": "Where is it?"},
        {"image": "images/1.png"},
    )
    items, bad = read(source, prompt="Describe it.")
    assert [item.prompt for item in items] == ["What is it?", "Where is it?", "Describe it."]
    assert items[0].id == "7"
    assert items[0].where == f"{source} line 1"
    assert len({item.id for item in items}) == 3
    assert items[1].image_hash == items[2].image_hash != items[0].image_hash
    assert bad == []


def test_ids_depend_on_nothing_but_image_and_question(folder: Path) -> None:
    first = read(table(folder, {"image": "images/0.png"}, {"image": "images/1.png"}))[0]
    second = read(table(folder, {"image": "images/1.png"}, {"image": "images/0.png"}))[0]
    assert [item.id for item in first] == [item.id for item in second][::-1]


def test_a_folder_of_images_is_asked_one_question(folder: Path) -> None:
    items, _ = read(folder / "images", limit=2)
    assert [item.image.where for item in items] == [str(folder / f"images/{n}.png") for n in (0, 1)]


def test_llava_conversations(folder: Path) -> None:
    path = folder / "llava.json"
    turns = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "Red."}]
    path.write_text(json.dumps([{"id": "a", "image": "2.png", "conversations": turns}]))
    items, _ = read(path, images=str(folder / "images"))
    assert [(item.id, item.prompt) for item in items] == [("a", "What is it?")]
    assert items[0].where == f"{path} entry 1"


BAD = [
    ("{", "line 2: the line is not JSON"),
    ({"prompt": "What?"}, "line 2: names no image: give one of image"),
    ({"image": "../0.png"}, "line 2: '../0.png' leaves"),
    ({"image": "/etc/passwd"}, "line 2: '/etc/passwd' is absolute"),
    ({"image": "images/9.png"}, "line 2: .*9.png does not exist"),
    ({"image": "questions.jsonl"}, "line 2: not an image of an allowed format"),
    ({"image": "images/1.png", "prompt": 3}, "line 2: the prompt is a int, not a text"),
    ({"image": "images/1.png", "prompt": "<image>"}, "line 2: the prompt is empty"),
    ({"image": "images/1.png", "id": "x"}, "line 2: id 'x' is also at .*line 1"),
    ({"image": "images/0.png", "id": "y"}, "line 2: the same question is also at .*line 1"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_rows_stop_or_are_listed(folder: Path, row: Any, message: str) -> None:
    source = table(folder, {"image": "images/0.png", "id": "x"}, row, {"image": "images/2.png"})
    with pytest.raises(InputError, match=f"questions.jsonl {message}"):
        read(source)
    items, bad = read(source, on_bad_row="skip")
    assert len(items) == 2
    assert [str(b).partition(": ")[0] for b in bad] == [f"{source} line 2"]


def test_sources_that_are_none(folder: Path) -> None:
    (folder / "list.json").write_text('{"a": 1}')
    (folder / "broken.json").write_text("[")
    (folder / "empty.jsonl").write_text("")
    (folder / "text.txt").write_text("a\n")
    for name, message in [
        ("list.json", "not a list of conversations"),
        ("broken.json", "not usable JSON"),
        ("empty.jsonl", "no questions"),
        ("text.txt", "not a folder"),
    ]:
        with pytest.raises(InputError, match=message):
            read(folder / name)
