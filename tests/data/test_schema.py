from __future__ import annotations

import pytest

from mmalign.data.schema import RowError, content_hash, content_id, require, row_to_info

A, B = content_hash(b"a"), content_hash(b"b")


def test_content_id_separates_its_parts() -> None:
    ids = {
        content_id("x", A, B),
        content_id("x", B, A),
        content_id("y", A, B),
        content_id("x", A, A),
        content_id("", A + b"x", B),
    }
    assert len(ids) == 5
    assert content_id("x", A, B) == content_id("x", A, B)
    # pinned: all randomness of a run is keyed by it
    assert content_id("x", A, B) == "68bf0090fd2cdc7f8fab9c32f21a2670"


def test_row_to_info() -> None:
    info = row_to_info({"prompt": " x ", "score_chosen": 1, "other": object()}, A, B)
    assert info is not None
    assert (info.prompt, info.score_chosen, info.margin) == (" x ", 1.0, None)
    assert info.pair_id == content_id(" x ", A, B)
    margin_only = row_to_info({"prompt": "x", "margin": -0.5}, A, B)
    assert margin_only is not None
    assert margin_only.margin == -0.5
    assert row_to_info({"prompt": "x", "score_chosen": 1, "score_rejected": 1}, A, B) is None


def test_require() -> None:
    require(["a", "b"], ["b"])
    with pytest.raises(RowError, match="'chosen' is missing; the nearest present is 'Chosen'"):
        require(["Chosen", "prompt"], ["prompt", "chosen"])
    with pytest.raises(RowError, match="there are none"):
        require([], ["prompt"])
