"""What the first screen of the README promises; `test_docs.py` has the rest."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_python_example_is_short() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.strip().splitlines()) <= 15


def test_first_screen_has_the_two_commands() -> None:
    first = README.split("## ")[0]
    assert "pip install uv && uv run mmalign quickstart image\n" in first
    assert "pip install uv && uv run pytest\n" in first
