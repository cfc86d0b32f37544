"""Loading of open_clip models for the rewards built on them."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.config import as_path
from mmalign.rewards._clip_preprocess import ClipPreprocess
from mmalign.types import InputError

FORMS = ("local-dir:FOLDER", "hf-hub:ORG/NAME", "pkg://PACKAGE/FOLDER")
PRECISIONS = ("fp32", "fp16", "bf16", "pure_fp16", "pure_bf16")


@dataclass(frozen=True)
class OpenClip:
    """A frozen open_clip model with its tokenizer and its preprocessing in tensor space."""

    model: Any
    tokenizer: Callable[[list[str]], Tensor]
    preprocess: ClipPreprocess

    def embed_images(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, H, W) in [0, 1] to unit vectors (B, D); differentiable."""
        weight = next(self.model.parameters())
        pixels = self.preprocess(images.to(weight.device)).to(weight.dtype)
        return F.normalize(self.model.encode_image(pixels), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts to unit vectors (B, D); equal texts are encoded once."""
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        tokens = self.tokenizer(list(rows)).to(next(self.model.parameters()).device)
        vectors = F.normalize(self.model.encode_text(tokens), dim=-1)
        return vectors[[rows[text] for text in texts]]


def load_open_clip(
    model: str,
    pretrained: str | None,
    device: str,
    precision: str,
    *,
    weights_later: bool = False,
) -> OpenClip:
    """Load a frozen open_clip model in evaluation mode.

    Args:
        model: a built-in architecture, `hf-hub:org/name`, or a folder with `open_clip_config.json`
            and weights, given as `local-dir:folder`, `folder` or `pkg://package/folder`.
        pretrained: weights of a built-in architecture: a tag, or a file.
        device: torch device.
        precision: open_clip's `fp32`, `fp16`, `bf16`, `pure_fp16` or `pure_bf16`.
        weights_later: only build the network; the caller loads its weights.

    Raises:
        InputError: if the model, its folder or its weights are missing or damaged, or if the
            weights are pickled objects.
    """
    if precision not in PRECISIONS:  # open_clip takes any other name for fp32
        raise InputError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}")
    name, weights = _resolve(model, pretrained, not weights_later)
    try:
        with _without_alarm() if weights_later else nullcontext():
            network: nn.Module = open_clip.create_model(
                name,
                pretrained=weights,
                load_weights=not weights_later,
                precision=precision,
                device=torch.device(device),
                force_quick_gelu=_quick_gelu(name, weights),
                pretrained_image=False,
                pretrained_text=False,
                require_pretrained=not weights_later,
                weights_only=True,
            )
        tokenizer = open_clip.get_tokenizer(name)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"open_clip weights of {model} hold pickled objects, which are never loaded: "
            "convert them to safetensors"
        ) from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"cannot load open_clip model {model!r}: {reason}") from error
    network.eval().requires_grad_(False)
    visual: Any = network.visual
    return OpenClip(network, tokenizer, ClipPreprocess.from_open_clip(visual.preprocess_cfg))


@contextmanager
def _without_alarm() -> Iterator[None]:
    """Leave out open_clip's warning that weights are random, where they are about to be loaded."""

    def wanted(record: logging.LogRecord) -> bool:
        return "Model initialized randomly" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(wanted)
    try:
        yield
    finally:
        root.removeFilter(wanted)


def _quick_gelu(name: str, pretrained: str | None) -> bool:
    """Say whether weights of a tag were trained with QuickGELU, as OpenAI's.

    open_clip only warns when the architecture by that name has GELU, and gives other scores.
    """
    tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    return bool(tag.get("quick_gelu", False))


def _resolve(model: str, pretrained: str | None, with_weights: bool) -> tuple[str, str | None]:
    if model.startswith("hf-hub:"):
        return model, None
    folder = as_path(model.removeprefix("local-dir:"))
    if model.startswith(("local-dir:", "pkg://")) or folder.is_dir():
        return f"local-dir:{_checked_folder(folder, with_weights)}", None
    architectures = open_clip.list_models()
    if model.replace("/", "-") not in architectures:
        raise InputError(
            f"open_clip model {model!r} is neither a folder nor a built-in architecture "
            f"such as {', '.join(architectures[:3])}; other forms: {', '.join(FORMS)}"
        )
    return model, _weights(model, pretrained) if with_weights else None


def _checked_folder(folder: Path, with_weights: bool) -> Path:
    if not folder.is_dir():
        raise InputError(f"open_clip folder {folder} does not exist")
    if not (folder / "open_clip_config.json").is_file():
        raise InputError(f"open_clip folder {folder} has no open_clip_config.json")
    suffixes = {item.suffix for item in folder.iterdir()}
    if with_weights and not suffixes & {".safetensors", ".bin", ".pth"}:
        raise InputError(f"open_clip folder {folder} has no weights (*.safetensors)")
    return folder


def _weights(model: str, pretrained: str | None) -> str:
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained in tags:
        return str(pretrained)
    if pretrained and as_path(pretrained).is_file():
        return str(as_path(pretrained))
    known = f"its tags are {', '.join(tags)}" if tags else "it has no tags"
    raise InputError(
        f"open_clip model {model}: pretrained={pretrained!r} is neither a tag nor a file; {known}"
    )
