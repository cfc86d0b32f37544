"""What the README shows is what happens."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from mmalign.cli import COMMANDS
from mmalign.options import packaged_configs

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_example_prints_what_is_shown() -> None:
    (code,), shown = blocks("python"), blocks("text")[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == shown
    assert len(code.strip().splitlines()) <= 15


def test_first_screen_has_the_two_commands() -> None:
    first = README.split("## ")[0]
    assert "pip install uv && uv run mmalign quickstart image\n" in first
    assert "pip install uv && uv run pytest\n" in first


@pytest.mark.parametrize(
    "line",
    [line for block in blocks("bash") for line in block.replace("\\\n", "").splitlines()],
)
def test_commands_and_configs_exist(line: str) -> None:
    words = shlex.split(line, comments=True)
    if "mmalign" not in words:
        return
    words = words[words.index("mmalign") + 1 :]
    assert any(tuple(words[: len(command)]) == command for command in COMMANDS), line
    if "--config" in words:
        assert words[words.index("--config") + 1] in packaged_configs()


def test_linked_files_exist() -> None:
    root = Path(__file__).parents[1]
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert all((root / link).exists() for link in links)
