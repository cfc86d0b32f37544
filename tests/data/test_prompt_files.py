from __future__ import annotations

from pathlib import Path

import pytest

from mmalign.data.prompts import read_prompts
from mmalign.types import InputError


def test_text(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffa red ball\r\n  zwei Bälle \r\nline\u2028separator\n\n".encode())
    assert read_prompts(file) == ["a red ball", "zwei Bälle", "line\u2028separator"]
    assert read_prompts(str(file), limit=1) == ["a red ball"]


def test_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('\ufeff{"prompt": "a"}\n{"prompt": "b", "x": 1}\n', encoding="utf-8")
    assert read_prompts(file) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("p.txt", "a\n\nb\n", "line 2: the prompt is empty"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": " "}', "line 2: the prompt is empty"),
        ("p.jsonl", '{"promt": "a"}', "line 1: 'prompt' is missing; the nearest .* 'promt'"),
        ("p.jsonl", '{"prompt": 3}', "line 1: the prompt is a int"),
        ("p.jsonl", '{"prompt": "\\ud800"}', "line 1: .*lone surrogate"),
        ("p.jsonl", '{"prompt": "a"', "line 1: the line is not JSON"),
        ("p.txt", "", "has no prompts"),
        ("p.txt", "\n\n", "has no prompts"),
    ],
)
def test_bad(tmp_path: Path, name: str, text: str, problem: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(InputError, match=problem):
        read_prompts(file)


def test_missing_and_utf16(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_prompts(tmp_path / "no.txt")
    (tmp_path / "p.txt").write_text("a prompt", encoding="utf-16")
    with pytest.raises(InputError, match="UTF-16"):
        read_prompts(tmp_path / "p.txt")
