"""Answer files: every layout, and one line with file and row for everything that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmalign.hallucination.records import (
    check_complete,
    check_known,
    id_field,
    image_id,
    read_records,
    text_field,
    without_doubles,
)
from mmalign.types import InputError


def write(folder: Path, text: str, name: str = "answers.json") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        '[{"a": 1}, {"a": 2}]',
        '{"a": 1}\n\n{"a": 2}\n',
        '\ufeff{"a": 1}\r\n{"a": 2}',
        ' [{"a":1},{"a":2}]',
    ],
)
def test_reads_lists_and_lines_whatever_the_name(tmp_path: Path, text: str) -> None:
    rows = read_records(write(tmp_path, text))
    assert [row.fields for row in rows] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": \n', "answers.json line 2 is not JSON"),
        ('[{"a": 1},\n{"a" 2}]', "answers.json line 2 column 6 is not JSON"),
        ('{"a": 1}\n[1]\n', "line 2 is a JSON list, not an object"),
        ('[{"a": 1}, 5]', "entry 2 is a JSON number, not an object"),
        ("", "is empty"),
        ("[]", "is empty"),
        ("[" * 100_000, "JSON"),
        ("<html>", "line 1 is not JSON"),
        ('{"a": ' + "1" * 5000 + "}", "line 1 is not usable JSON"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_records(write(tmp_path, text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"b": "x"}', r"line 1: no 'answer' or 'text'; its keys are b"),
        ('{"answer": null}', "line 1: 'answer' is null, not text"),
        ('{"answer": 5}', "line 1: 'answer' is number, not text"),
    ],
)
def test_bad_text(tmp_path: Path, row: str, message: str) -> None:
    (record,) = read_records(write(tmp_path, row))
    with pytest.raises(InputError, match=message):
        text_field(record, "answer", "text")


@pytest.mark.parametrize("value", ["true", "null", "1.5", '""', "[1]"])
def test_bad_ids(tmp_path: Path, value: str) -> None:
    (record,) = read_records(write(tmp_path, f'{{"id": {value}}}'))
    with pytest.raises(InputError, match=r"line 1: 'id' is .*, not a number or text"):
        id_field(record, "id")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("42", "42"), ("000000000042", "42"), ("COCO_val2014_000000000042.jpg", "42"),
        ("COCO_val2014_000000000042", "42"), ("val2014/000000000042.jpg", "42"),
        ("0", "0"), ("scene-07", "scene-07"), ("AMBER_1.jpg", "AMBER_1.jpg"),
    ],
)  # fmt: skip
def test_ids_of_images(name: str, expected: str) -> None:
    assert image_id(name) == expected


def test_doubled_unknown_and_missing_ids(tmp_path: Path) -> None:
    rows = read_records(write(tmp_path, '{"id": 1}\n{"id": 2}\n{"id": "1"}'))
    keyed = [(id_field(row, "id"), row) for row in rows]
    with pytest.raises(InputError, match=r"line 3: id 1 comes again, first at .*line 1"):
        without_doubles(keyed)
    found = without_doubles(keyed[:2])
    with pytest.raises(InputError, match="line 2: id 2 is not in labels"):
        check_known(found, ["1"], "labels")
    path, wanted = Path("a.json"), ["1", "2", "3", "4"]
    with pytest.raises(InputError, match=r"a.json: no answer for 2 of 4 ids \(3, 4\)"):
        check_complete(path, found, wanted, "stop")
    (warning,) = check_complete(path, found, wanted, "skip")
    assert warning.startswith("2 of 4 ids")
    assert check_complete(path, found, ["1"], "stop") == []


def test_keys_of_strangers_stay_on_one_line(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text('{"an\\nswer": 1}')
    (record,) = read_records(file)
    with pytest.raises(InputError, match="no 'answer'; its keys are an swer"):
        text_field(record, "answer")
