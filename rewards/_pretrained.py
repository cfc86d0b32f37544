"""Loading of transformers' models for the rewards built on them, as checkpoints of strangers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import transformers
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from mmalign.config import as_path
from mmalign.data.weight_index import refuse_foreign_shards
from mmalign.rewards._clip_preprocess import ClipPreprocess
from mmalign.rewards._weights import HUB_ID, to_dtype
from mmalign.types import InputError

FAILURES = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, AttributeError)


@dataclass(frozen=True)
class PretrainedClip:
    """A frozen `transformers.CLIPModel` with its tokenizer and preprocessing in tensor space."""

    model: Any
    tokenizer: Any
    preprocess: ClipPreprocess

    def pixels(self, images: Tensor) -> Tensor:
        """Prepare images (B, 3, H, W) in [0, 1] for the network, in its dtype."""
        weight = self.model.logit_scale
        return self.preprocess(images.to(weight.device)).to(weight.dtype)

    def tokens(self, texts: Sequence[str], *, padding: bool | str = True) -> dict[str, Tensor]:
        """Tokenize texts, cut to what the text model reads."""
        length = self.model.config.text_config.max_position_embeddings
        encoded = self.tokenizer(
            list(texts), padding=padding, truncation=True, max_length=length, return_tensors="pt"
        )
        device = self.model.logit_scale.device
        return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}

    def embed_images(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, H, W) in [0, 1] to unit vectors (B, D); differentiable."""
        pooled = self.model.vision_model(pixel_values=self.pixels(images)).pooler_output
        return unit(self.model.visual_projection(pooled))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts to unit vectors (B, D); equal texts are encoded once."""
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        pooled = self.model.text_model(**self.tokens(list(rows))).pooler_output
        return unit(self.model.text_projection(pooled))[[rows[text] for text in texts]]


def unit(vectors: Tensor) -> Tensor:
    """Scale rows to length 1, in float32 where they are of half precision."""
    return F.normalize(vectors.float() if vectors.element_size() < 4 else vectors, dim=-1)


def load_clip(model: str, processor: str | None, dtype: str, device: str) -> PretrainedClip:
    """Load a CLIP model of transformers.

    Args:
        model: folder in transformers' format, `pkg://package/folder`, or hub id.
        processor: where tokenizer and image processor are, if not with the model.
        dtype: of the weights.
        device: torch device.

    Raises:
        InputError: as `load_pretrained`.
    """
    network = load_pretrained(transformers.CLIPModel, model, dtype, device)
    tokenizer = load_part(transformers.AutoTokenizer, processor or model)
    return PretrainedClip(network, tokenizer, load_preprocess(processor or model))


def load_preprocess(model: str) -> ClipPreprocess:
    """Read how a model's images are prepared from its image processor.

    Raises:
        InputError: there is none, or it does something else.
    """
    processor = load_part(transformers.AutoImageProcessor, model)
    return ClipPreprocess.from_transformers(processor.to_dict(), model)


def load_part(kind: Any, model: str) -> Any:
    """Load a tokenizer or an image processor.

    Raises:
        InputError: it is missing or damaged.
    """
    what = "tokenizer" if "Tokenizer" in kind.__name__ else "image processor"
    location = _location(model)
    try:
        part = kind.from_pretrained(location, trust_remote_code=False)
    except FAILURES as error:
        raise InputError(f"{model}: its {what} cannot be loaded: {_reason(error)}") from error
    if what == "tokenizer" and len(part) <= len(set(part.all_special_ids)):
        raise InputError(f"{model}: has no files of a tokenizer")  # transformers makes an empty one
    return part


def load_config(kind: Any, model: str) -> Any:
    """Load the configuration of a model.

    Raises:
        InputError: it is missing or damaged.
    """
    location = _location(model)
    try:
        return kind.from_pretrained(location)
    except FAILURES as error:
        raise InputError(f"{model}: its config.json cannot be loaded: {_reason(error)}") from error


def load_pretrained(kind: Any, model: str, dtype: str, device: str, **options: Any) -> Any:
    """Load a frozen model of transformers, from safetensors only.

    Args:
        kind: class with `from_pretrained`.
        model: folder in transformers' format, `pkg://package/folder`, or hub id.
        dtype: of the weights.
        device: torch device.
        options: further arguments of `from_pretrained`.

    Raises:
        InputError: it does not exist, is damaged, pickled, or is a checkpoint of another model:
            transformers would fill the gaps with random weights.
    """
    location, wanted = _location(model), to_dtype(dtype)
    _check_weights(model, options.get("subfolder", ""))
    try:
        refuse_foreign_shards(location, subfolder=options.get("subfolder", ""))
        with _quietly():
            network, info = kind.from_pretrained(
                location, dtype=wanted, use_safetensors=True, output_loading_info=True, **options
            )
    except FAILURES as error:
        raise InputError(f"{model}: cannot be loaded: {_reason(error)}") from error
    gaps = sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]}))
    if gaps:
        raise InputError(
            f"{model}: is not a checkpoint of {type(network).__name__}: "
            f"{len(gaps)} weights are missing or of another shape, such as {gaps[0]}"
        )
    return network.to(device).eval().requires_grad_(False)


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide the bar over the weights, and the report of what is missing: that is our error."""
    switch = transformers.utils.logging
    verbosity, bars = switch.get_verbosity(), switch.is_progress_bar_enabled()
    switch.set_verbosity_error()
    switch.disable_progress_bar()
    try:
        yield
    finally:
        switch.set_verbosity(verbosity)
        if bars:
            switch.enable_progress_bar()


def _location(model: str) -> str:
    path = as_path(model)
    if path.is_dir():
        return str(path)
    if HUB_ID.fullmatch(model):
        return model
    raise InputError(f"{model}: is neither a folder in transformers' format nor a hub id")


def _check_weights(model: str, subfolder: str) -> None:
    folder = as_path(model) / subfolder
    suffixes = {file.suffix for file in folder.iterdir()} if folder.is_dir() else set()
    if suffixes & {".bin", ".pt", ".pth", ".ckpt"} and ".safetensors" not in suffixes:
        raise InputError(
            f"{model}: has only pickled weights, which are never loaded: "
            "convert them to safetensors"
        )


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
