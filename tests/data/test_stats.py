from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mmalign.config import PairsConfig
from mmalign.data.readers import read_pairs
from mmalign.data.stats import pair_stats, plot_gaps
from mmalign.types import InputError


def test_counts_and_quantiles(imagefolder: Callable[..., Path]) -> None:
    changes = {f"row{n}": {"margin": n, "source": "ab"[n % 2], "prompt": "p"} for n in range(6)}
    table = read_pairs(PairsConfig(path=str(imagefolder(7, **changes))))
    stats = pair_stats(table)
    assert (stats.pairs, stats.ties, stats.bad_rows, stats.prompts) == (6, 1, 0, 2)
    assert stats.gaps == [1, 2, 3, 4, 5]
    assert stats.gap_quantiles == {0: 1, 0.1: 1.4, 0.25: 2, 0.5: 3, 0.75: 4, 0.9: 4.6, 1: 5}
    assert stats.sources == {"a": 2, "b": 3}


def test_no_scores(imagefolder: Callable[..., Path]) -> None:
    stats = pair_stats(read_pairs(PairsConfig(path=str(imagefolder()))))
    assert (stats.gaps, stats.gap_quantiles) == ([], {})


def test_picture(tmp_path: Path) -> None:
    plot_gaps([0.1, 0.2, 0.4, 1.0], tmp_path / "deep" / "gaps.png")
    with Image.open(tmp_path / "deep" / "gaps.png") as picture:
        assert picture.width > 500
        assert len(picture.convert("RGB").getcolors(100_000) or []) > 3
    plot_gaps([0.1], tmp_path / "gaps.svg")
    assert b"<svg" in (tmp_path / "gaps.svg").read_bytes()
    with pytest.raises(InputError, match="cannot write"):
        plot_gaps([0.1], tmp_path / "gaps.svg" / "x.png")
