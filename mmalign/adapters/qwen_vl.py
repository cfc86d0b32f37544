"""Qwen2-VL (Wang et al. 2024, arXiv 2409.12191), Qwen2.5-VL and Qwen3-VL."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from mmalign.adapters._branches import Layout
from mmalign.adapters._vlm import VlmFamily


class QwenVlAdapter(VlmFamily):
    """Images keep their resolution, and their tokens have three positions each (M-RoPE)."""

    family = "qwen_vl"

    def layout(self) -> Layout:
        """Say what is different about this family."""
        config = self.model.config
        return Layout(
            image_token_id=config.image_token_id,
            positions=partial(
                mrope_positions,
                image_token_id=config.image_token_id,
                merge=config.vision_config.spatial_merge_size,
            ),
            flat_positions=False,
        )


def mrope_positions(
    ids: Tensor, tensors: Mapping[str, Tensor], *, image_token_id: int, merge: int
) -> Tensor:
    """Count the temporal, height and width positions (3, P) of a prefix (P,).

    Text counts on in all three at once. The tokens of an image whose grid of features is (t, h, w)
    get their place in it added to the position it begins at, and what follows begins after the
    largest of them (Wang et al. 2024, section 2.1).

    Args:
        ids: tokens, images expanded.
        tensors: with images, `image_grid_thw` (N, 3) in patches.
        image_token_id: the token of images.
        merge: patches per token, along height and along width.
    """
    grids = iter(tensors["image_grid_thw"].tolist() if tensors else [])
    parts: list[Tensor] = []
    place, at = 0, 0
    is_image = (ids == image_token_id).tolist()
    while at < len(ids):
        if is_image[at]:
            t, h, w = next(grids)
            sizes = (t, h // merge, w // merge)
            grid = torch.stack(torch.meshgrid(*map(torch.arange, sizes), indexing="ij"))
            parts.append(grid.reshape(3, -1) + place)
            at, place = at + grid[0].numel(), place + max(sizes[1:])
        else:
            end = is_image.index(True, at) if True in is_image[at:] else len(ids)
            parts.append((place + torch.arange(end - at)).expand(3, -1))
            at, place = end, place + end - at
    return torch.cat(parts, dim=1)
