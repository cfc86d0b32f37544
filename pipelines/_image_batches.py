"""Images of several sizes in batches of one, whole prompts together where a reward needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmalign.scoring import divide, scores_sets
from mmalign.types import InputError


def that_score_sets(rewards: Mapping[str, Any]) -> list[str]:
    """List the names of rewards that need all images of a prompt in one call."""
    return [name for name, reward in rewards.items() if scores_sets(reward)]


def image_batches(
    prompts: Sequence[str],
    read: Callable[[int], Tensor | None],
    size: int,
    comparing: Sequence[str] = (),
) -> Iterator[tuple[list[int], Tensor]]:
    """Read images and stack neighbors of one size.

    Args:
        prompts: one per image.
        read: reads the image (3, H, W) of a number; None for one that is left out.
        size: images at a time; a prompt that is not cut may have more.
        comparing: names of rewards that compare the images of a prompt. With any, prompts are not
            cut, and their images come in the order of the prompts' first ones.

    Yields:
        The numbers of the images, and the images (B, 3, H, W).

    Raises:
        InputError: as `read`, or if images that are compared have several sizes.
    """
    units = divide(prompts, 1, whole=bool(comparing))
    rows: list[int] = []
    images: list[Tensor] = []
    for unit in units:
        found = [(row, image) for row in unit if (image := read(row)) is not None]
        if not found:
            continue
        if comparing:
            check_one_size(comparing, prompts[unit[0]], [image for _, image in found])
        if rows and (len(rows) + len(found) > size or found[0][1].shape != images[0].shape):
            yield rows, torch.stack(images)
            rows, images = [], []
        rows += [row for row, _ in found]
        images += [image for _, image in found]
    if rows:
        yield rows, torch.stack(images)


def check_one_size(comparing: Sequence[str], prompt: str, images: Sequence[Tensor]) -> None:
    """Refuse to score part of a prompt's images against each other.

    Raises:
        InputError: naming the rewards, the prompt and the sizes.
    """
    sizes = dict.fromkeys(f"{image.shape[2]}x{image.shape[1]}" for image in images)
    if len(sizes) > 1:
        raise InputError(
            f"reward {', '.join(comparing)} compares the images of a prompt, and those of "
            f"{prompt[:60]!r} have several sizes ({', '.join(sizes)}): bring them to one"
        )


def refuse_sets(rewards: Mapping[str, Any]) -> None:
    """Refuse rewards that compare the images of a prompt where images pass by one after the other.

    Raises:
        InputError: naming the rewards.
    """
    comparing = that_score_sets(rewards)
    if comparing:
        raise InputError(
            f"reward {', '.join(comparing)} compares the images of a prompt, which shards do not "
            "keep together: unpack them into a folder with metadata.jsonl"
        )
