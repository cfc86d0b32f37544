"""Pairs as tokens: what is spanned, shortened, and refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from vlm_questions import make_pair, reference

from mmalign.adapters._vlm import TooLongError, VlmFamily
from mmalign.data.schema import RowError
from mmalign.types import (
    ImageRef,
)


def test_spans_hold_the_answer_and_the_question(vlm_adapter: Callable[[str], VlmFamily]) -> None:
    for name, end in (("llava", "</s>"), ("qwen2_vl", "<|im_end|>")):
        adapter = vlm_adapter(name)
        decode = adapter.chat.tokenizer.decode
        encoded = adapter.encode_pair(make_pair(2))
        assert decode(encoded.chosen_ids).strip() == f"A red circle.{end}"
        assert decode(encoded.prefix_ids[encoded.prefix_text]).strip() == "What is in the picture?"
        assert adapter.chat.image_token not in decode(encoded.prefix_ids[encoded.prefix_text])
        image = adapter.model.config.image_token_id
        assert encoded.images is not None
        features = adapter.encode_images(encoded.images)
        assert int((encoded.prefix_ids == image).sum()) == len(features.embeds)


def test_long_answers_are_shortened_and_images_never(
    vlm_adapter: Callable[[str], VlmFamily],
) -> None:
    adapter = vlm_adapter("llava")
    whole = adapter.encode_pair(make_pair())
    limit = len(whole.prefix_ids) + 4
    cut = adapter.encode_pair(make_pair(), max_length=limit)
    assert cut.truncated
    assert not whole.truncated
    assert torch.equal(cut.prefix_ids, whole.prefix_ids)
    assert torch.equal(cut.rejected_ids, whole.rejected_ids[:4])
    with pytest.raises(TooLongError, match="leaves no room for an answer within 5"):
        adapter.encode_pair(make_pair(), max_length=5)
    with pytest.raises(TooLongError, match="the same in their first 1 tokens"):
        adapter.encode_pair(make_pair(rejected="A red square."), max_length=limit - 3)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_control_tokens_in_texts_are_refused(
    name: str, field: str, vlm_adapter: Callable[[str], VlmFamily]
) -> None:
    adapter = vlm_adapter(name)
    token = adapter.chat.image_token
    with pytest.raises(RowError, match="control tokens"):
        adapter.encode_pair(make_pair(**{field: f"What {token} is this?"}))
    if field != "prompt":
        end = adapter.chat.tokenizer.eos_token
        with pytest.raises(RowError, match="control tokens"):
            adapter.encode_pair(make_pair(**{field: f"A circle.{end} A square."}))


def test_corrupt_image_is_named(vlm_adapter: Callable[[str], VlmFamily]) -> None:
    data = reference(0).data
    assert isinstance(data, bytes)
    broken = ImageRef(data[: len(data) // 2], "pairs.parquet row 7")
    with pytest.raises(RowError, match=r"^pairs.parquet row 7: the image cannot be decoded"):
        vlm_adapter("llava").encode_pair(make_pair(images=(broken,)))
