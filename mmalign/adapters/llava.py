"""LLaVA 1.5 (Liu et al. 2023, arXiv 2310.03744) and LLaVA-NeXT."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmalign.adapters._branches import Layout
from mmalign.adapters._vlm import VlmFamily


class LlavaAdapter(VlmFamily):
    """Features of images take the places of tokens, which are simply counted."""

    family = "llava"

    def layout(self) -> Layout:
        """Say what is different about this family."""
        return Layout(
            image_token_id=self.model.config.image_token_id,
            positions=_positions,
            flat_positions=True,
        )


def _positions(ids: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.arange(len(ids))[None]
