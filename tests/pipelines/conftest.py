"""Pictures to label."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mmalign.data.files import write_jsonl

PROMPTS = ["red", "a red", "red <b>&amp;</b>"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures of each prompt, as `mmalign generate` writes them."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rows = []
    for number, prompt in enumerate(PROMPTS):
        for index in range(2):
            name = f"{number}-{index}.png"
            Image.new("RGB", (16, 16), (80 * number, 200 * index, 0)).save(pictures / name)
            rows.append({"file_name": name, "prompt": prompt})
    write_jsonl(pictures / "metadata.jsonl", rows)
    return pictures
