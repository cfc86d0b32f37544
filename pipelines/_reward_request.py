"""Requests to `mmalign serve-reward`: a stranger's JSON, read carefully."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mmalign.data.images import check_header, decode, to_tensor
from mmalign.data.schema import RowError
from mmalign.types import ImageRef, InputError, Response

if TYPE_CHECKING:
    from mmalign.config import ServeRewardConfig

Sample = Tensor | Response
Kind = type[str] | type[list[Any]] | type[dict[str, Any]]
_KINDS: dict[Kind, str] = {str: "texts", list: "lists", dict: "objects"}


@dataclass
class Asked:
    """What a request asks: a score for each sample and its prompt.

    Attributes:
        samples: images, still encoded, or answers.
        prompts: as many prompts.
        pixels: of all images together.
        max_pixels: larger images are not decoded.
    """

    samples: Sequence[ImageRef | Response]
    prompts: list[str]
    pixels: int
    max_pixels: int

    def decoded(self) -> list[Sample]:
        """Decode the images; a reward of answers decodes those it looks at.

        Raises:
            InputError: naming the sample whose image cannot be decoded.
        """
        return [
            self._tensor(sample) if isinstance(sample, ImageRef) else sample
            for sample in self.samples
        ]

    def _tensor(self, ref: ImageRef) -> Tensor:
        try:
            return to_tensor(decode(ref, self.max_pixels))
        except RowError as error:
            raise InputError(f"{ref.where}: {error}") from error


def read_request(body: bytearray, modality: str, config: ServeRewardConfig) -> Asked:
    """Read samples and prompts; of images, nothing but their headers.

    Raises:
        InputError: saying what is wrong, and with which sample.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise InputError("the request is not JSON") from None
    if not isinstance(content, dict):
        raise InputError("the request is not a JSON object")
    prompts = _list(content, "prompts", str)
    if not 1 <= len(prompts) <= config.max_samples:
        raise InputError(f"{len(prompts)} samples: send 1 to {config.max_samples} at a time")
    samples = _read_images(content) if modality == "image" else _read_responses(content)
    if len(samples) != len(prompts):
        raise InputError(f"{len(samples)} samples for {len(prompts)} prompts")
    return Asked(samples, prompts, _count_pixels(samples, config), config.max_pixels)


def _read_images(content: Mapping[str, Any]) -> list[ImageRef]:
    if "responses" in content:
        raise InputError("this reward scores images, not answers")
    texts = _list(content, "images", str)
    return [_image(text, f"sample {index}") for index, text in enumerate(texts)]


def _read_responses(content: Mapping[str, Any]) -> list[Response]:
    texts = _list(content, "responses", str)
    images = _list(content, "images", list) if "images" in content else [[] for _ in texts]
    fields = _list(content, "fields", dict) if "fields" in content else [{} for _ in texts]
    if not len(texts) == len(images) == len(fields):
        raise InputError(f"{len(texts)} responses, {len(images)} images, {len(fields)} fields")
    samples: list[Response] = []
    for index, (text, shown, known) in enumerate(zip(texts, images, fields, strict=True)):
        where = f"sample {index}"
        if not all(isinstance(image, str) for image in shown):
            raise InputError(f"{where}: its images are not texts in base64")
        refs = tuple(_image(image, where) for image in shown)
        samples.append(Response(text=text, images=refs, fields=known))
    return samples


def _count_pixels(samples: Sequence[ImageRef | Response], config: ServeRewardConfig) -> int:
    total = 0
    for index, sample in enumerate(samples):
        shown = (sample,) if isinstance(sample, ImageRef) else sample.images
        refs = [ref for ref in shown if isinstance(ref, ImageRef)]
        try:
            for ref in refs:
                total += check_header(ref, config.max_pixels)
        except RowError as error:
            raise InputError(f"sample {index}: {error}") from error
    if total > (most := config.max_total_pixels):
        raise InputError(
            f"the images have {total} pixels together, more than max_total_pixels {most}: "
            "send fewer at a time"
        )
    return total


def _image(text: str, where: str) -> ImageRef:
    try:
        return ImageRef(base64.b64decode(text, validate=True), where)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{where}: the image is not base64") from error


def _list(content: Mapping[str, Any], name: str, kind: Kind) -> list[Any]:
    value = content.get(name)
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise InputError(f'"{name}" of the request is not a list of {_KINDS[kind]}')
    return value
