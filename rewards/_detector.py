"""Detectors of transformers: what is where in an image, by class name.

Three kinds: detectors with fixed classes (DETR, RT-DETR, YOLOS ...), Mask2Former trained on
instances, which makes masks besides, and OWLv2, which is asked for any words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from PIL import Image
from torch import Tensor

from mmalign.rewards._geneval_rules import Found
from mmalign.rewards._pretrained import load_config, load_part, load_pretrained
from mmalign.types import InputError

SYNONYMS = (
    ("computer mouse", "mouse"),
    ("tv remote", "remote"),
    ("computer keyboard", "keyboard"),
    ("couch", "sofa"),
    ("tv", "tvmonitor", "television"),
    ("motorcycle", "motorbike"),
    ("airplane", "aeroplane"),
    ("dining table", "diningtable"),
    ("potted plant", "pottedplant"),
)
"""Names of one class in GenEval, COCO and VOC."""
TEMPLATE = "a photo of a {}"


class Kind(NamedTuple):
    """How a sort of detector is loaded and read."""

    model: Any
    processor: Any
    fixed: bool


class Detector:
    """A frozen detector with its processor."""

    def __init__(self, model: str, dtype: str, device: str) -> None:
        """Load the detector.

        Raises:
            InputError: if it cannot be loaded or is of another kind.
        """
        self.kind = _kind(model)
        self.name = model
        self.network = load_pretrained(self.kind.model, model, dtype, device)
        self.processor = load_part(self.kind.processor, model)
        self.labels: Mapping[int, str] = self.network.config.id2label if self.kind.fixed else {}

    def check_classes(self, names: Sequence[str]) -> None:
        """Check that it knows these classes.

        Raises:
            InputError: naming the first that it does not know.
        """
        if not self.kind.fixed:
            return
        known = set(self.labels.values())
        for name in names:
            if not known & set(_synonyms(name)):
                raise InputError(f"detector {self.name} has no class {name!r}")

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Image.Image], names: Sequence[str], threshold: float
    ) -> list[dict[str, list[Found]]]:
        """Detect objects of some classes with at least some confidence in each image."""
        inputs = self._inputs(images, names)
        outputs = self.network(**inputs)
        sizes = [(image.height, image.width) for image in images]
        return [
            _by_name(found, names)
            for found in self._read(outputs, sizes, threshold, [TEMPLATE.format(n) for n in names])
        ]

    def _inputs(self, images: Sequence[Image.Image], names: Sequence[str]) -> dict[str, Any]:
        options: dict[str, Any] = {"images": list(images), "return_tensors": "pt"}
        if not self.kind.fixed:
            options["text"] = [[TEMPLATE.format(name) for name in names]] * len(images)
        inputs = self.processor(**options)
        weight = next(self.network.parameters())
        return {
            key: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
            for key, value in inputs.items()
        }

    def _read(
        self,
        outputs: Any,
        sizes: list[tuple[int, int]],
        threshold: float,
        questions: list[str],
    ) -> list[list[tuple[str, Found]]]:
        if hasattr(outputs, "masks_queries_logits"):
            read = self.processor.post_process_instance_segmentation(
                outputs, threshold=threshold, target_sizes=sizes, return_binary_maps=True
            )
            return [self._masks(one) for one in read]
        if self.kind.fixed:
            read = self.processor.post_process_object_detection(
                outputs, threshold=threshold, target_sizes=torch.tensor(sizes)
            )
            names: Callable[[int], str] = self.labels.__getitem__
        else:
            read = self.processor.post_process_grounded_object_detection(
                outputs, threshold=threshold, target_sizes=torch.tensor(sizes)
            )
            names = questions.__getitem__
        return [
            [
                (names(int(label)), Found(_box(box), float(score)))
                for label, box, score in zip(
                    one["labels"], one["boxes"], one["scores"], strict=True
                )
            ]
            for one in read
        ]

    def _masks(self, one: dict[str, Any]) -> list[tuple[str, Found]]:
        found = []
        for info, mask in zip(one["segments_info"], one["segmentation"], strict=False):
            rows, columns = torch.nonzero(mask > 0, as_tuple=True)
            box = (
                *(float(columns.min()), float(rows.min())),
                *(float(columns.max()) + 1, float(rows.max()) + 1),
            )
            name = self.labels[info["label_id"]]
            found.append((name, Found(box, info["score"], (mask > 0).cpu())))
        return found


def _kind(model: str) -> Kind:
    found = load_config(transformers.AutoConfig, model).model_type
    if found == "mask2former":
        network = transformers.Mask2FormerForUniversalSegmentation
        return Kind(network, transformers.AutoImageProcessor, fixed=True)
    if found == "owlv2":
        return Kind(transformers.Owlv2ForObjectDetection, transformers.Owlv2Processor, fixed=False)
    fixed = ("detr", "conditional_detr", "deformable_detr", "rt_detr", "rt_detr_v2", "yolos")
    if found in fixed:
        return Kind(
            transformers.AutoModelForObjectDetection, transformers.AutoImageProcessor, fixed=True
        )
    raise InputError(
        f"{model}: model_type {found!r} is no detector that is supported: use mask2former, owlv2, "
        f"{', '.join(fixed)}"
    )


def _by_name(found: Sequence[tuple[str, Found]], names: Sequence[str]) -> dict[str, list[Found]]:
    result: dict[str, list[Found]] = {}
    for name in names:
        wanted = {*_synonyms(name), TEMPLATE.format(name)}
        result[name] = [one for label, one in found if label in wanted]
    return result


def _synonyms(name: str) -> tuple[str, ...]:
    return next((group for group in SYNONYMS if name in group), (name,))


def _box(box: Tensor) -> tuple[float, float, float, float]:
    left, top, right, bottom = (float(side) for side in box)
    return left, top, right, bottom
