"""The exact judge of Shapes world, as a reward that no training uses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmalign.shapes.captions import parse_description
from mmalign.shapes.parser import parse_image
from mmalign.types import InputError, Modality


class ShapesJudge:
    """Share of a prompt's claims that the parser finds true in a picture.

    The claims are those of `Description.claims` and one more, `clean`: everything in the picture
    is a readable object. A picture is `correct` when all of them hold.
    """

    name = "shapes_judge"
    modality: Modality = "image"
    differentiable = False
    range = (0.0, 1.0)

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score pictures (B, 3, 64, 64) in [0, 1]; returns shares of true claims (B,)."""
        claims = self._claims(samples, prompts)
        return torch.tensor([sum(c.values()) / len(c) for c in claims], dtype=torch.float32)

    def metrics(self, samples: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return `correct` (every claim holds) and `valid` (the parser could read all of it)."""
        claims = self._claims(samples, prompts)
        return {
            "correct": torch.tensor([float(all(c.values())) for c in claims]),
            "valid": torch.tensor([float(c["clean"]) for c in claims]),
        }

    def verdicts(self, samples: Tensor, prompts: Sequence[str]) -> list[str]:
        """Say in words what holds: `correct`, or the claims that fail."""
        failed = [
            [name for name, holds in claims.items() if not holds]
            for claims in self._claims(samples, prompts)
        ]
        return ["correct" if not names else f"wrong: {', '.join(names)}" for names in failed]

    def _claims(self, samples: Tensor, prompts: Sequence[str]) -> list[dict[str, bool]]:
        pictures = (samples.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
        arrays = pictures.permute(0, 2, 3, 1).cpu().numpy()
        verdicts = []
        for array, prompt in zip(arrays, prompts, strict=True):
            try:
                parsed = parse_image(array)
                claims = parse_description(prompt).claims(parsed.scene)
            except ValueError as error:
                raise InputError(f"the Shapes world judge cannot read this: {error}") from None
            verdicts.append({**claims, "clean": parsed.valid})
        return verdicts
