from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mmalign.config import PairsCheckConfig
from mmalign.pipelines import pairs_validate
from mmalign.types import InputError


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    for number in range(4):
        Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = [
        {"prompt": "a", "chosen_file_name": "0.png", "rejected_file_name": "1.png"},
        {"prompt": "b", "chosen_file_name": "2.png", "rejected_file_name": "3.png"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path


def test_good(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs_validate.run(PairsCheckConfig(path=str(pairs)))
    assert capsys.readouterr().out == "2 rows: 2 good, 0 ties, 0 bad (0 duplicates)\n"


def test_every_bad_row_is_printed(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = pairs / "metadata.jsonl"
    row = {"prompt": "c", "chosen_file_name": "x\x1b[31m.png", "rejected_file_name": "1.png"}
    lines = metadata.read_text().splitlines()
    metadata.write_text("\n".join(["{", lines[0], json.dumps(row), lines[0], lines[1]]))
    (pairs / "3.png").write_bytes((pairs / "3.png").read_bytes()[:50])
    with pytest.raises(InputError, match="has 4 bad rows"):
        pairs_validate.run(PairsCheckConfig(path=str(pairs)))
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 5
    for number, line in zip((1, 3, 4, 5), out, strict=False):
        assert line.startswith(f"{metadata} line {number}: ")
    assert "\x1b" not in out[1]
    assert "\\x1b[31m" in out[1]
    assert out[-1] == "5 rows: 1 good, 0 ties, 4 bad (1 duplicates)"


def test_empty(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(InputError, match="has no rows"):
        pairs_validate.run(PairsCheckConfig(path=str(tmp_path)))


@pytest.mark.parametrize("module", ["pairs_validate", "pairs_stats"])
def test_no_torch_is_imported(pairs: Path, module: str, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from mmalign.config import PairsCheckConfig\n"
        f"from mmalign.pipelines.{module} import run\n"
        "run(PairsCheckConfig(path=sys.argv[1], output=sys.argv[2]))\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'open_clip', 'accelerate', 'datasets'}\n"
        "sys.exit(','.join(heavy & set(sys.modules)) or None)"
    )
    command = [sys.executable, "-c", script, str(pairs), str(tmp_path / "out.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
