"""Hallucinated objects of an answer as a reward: CHAIR against annotations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.config import as_path
from mmalign.data.files import read_text
from mmalign.hallucination.objects import Objects, read_coco, read_labels
from mmalign.hallucination.records import image_id
from mmalign.hallucination.vocabulary import Vocabulary, coco_vocabulary, read_vocabulary
from mmalign.types import ImageRef, InputError, Modality, Response

Measure = Literal["share", "count", "any"]
MEASURES = ("share", "count", "any")


class ChairReward:
    """Minus the objects an answer names that are not in the image, plus those it names rightly.

        r = -h + coverage * (distinct objects named rightly / objects that are there)

    with h by `measure`: `share` = hallucinated mentions / mentions (CHAIR_i of one caption),
    `count` = hallucinated mentions, or `any` = 1 if there is one (CHAIR_s), and 0 for an answer
    that names no object. Rohrbach et al. 2018, arXiv 1809.02156; the benchmark's micro-averages
    are `mmalign evaluate chair`. Without coverage, an answer that says nothing is among the best.

    What is in an image comes from the row's own list `objects`, from a file of labels, or from
    COCO's annotations, by the row's `image_id` or else the image's file name.
    """

    name = "chair"
    modality: Modality = "text"
    differentiable = False

    def __init__(
        self,
        labels: str | None = None,
        annotations: str | None = None,
        vocabulary: str | None = None,
        measure: Measure = "share",
        coverage: float = 0.0,
    ) -> None:
        """Read what is true.

        Args:
            labels: file with `{image_id: [objects]}`, or rows with `image_id` and `objects`.
            annotations: folder with COCO's `instances_*.json` and `captions_*.json`.
            vocabulary: words of objects in the format of CHAIR's `synonyms.txt`; the built-in words
                for COCO's 80 classes when omitted.
            measure: how hallucinated mentions count.
            coverage: weight of what is named rightly.

        Raises:
            InputError: for files that cannot be used, both of them, or an unknown measure.
        """
        if labels is not None and annotations is not None:
            raise InputError("reward chair: give labels or annotations, not both")
        if measure not in MEASURES:
            raise InputError(f"reward chair: measure must be one of {', '.join(MEASURES)}")
        self._vocabulary = (
            coco_vocabulary()
            if vocabulary is None
            else read_vocabulary(as_path(vocabulary), strip=True)
        )
        self._objects = _objects(labels, annotations, self._vocabulary)
        self._measure, self._coverage = measure, coverage
        worst = float("-inf") if measure == "count" else -1.0
        self.range = (worst + min(coverage, 0.0), max(coverage, 0.0))

    def __call__(self, samples: Sequence[Response], prompts: Sequence[str]) -> Tensor:
        """Score answers; returns (B,).

        Raises:
            InputError: for an image whose objects are unknown.
        """
        return torch.tensor([self._score(sample) for sample in samples], dtype=torch.float64)

    def _score(self, sample: Response) -> float:
        truth = self._truth(sample)
        nodes = [mention.node for mention in self._vocabulary.mentions(sample.text)]
        absent = sum(node not in truth for node in nodes)
        invented = {
            "share": absent / len(nodes) if nodes else 0.0,
            "count": float(absent),
            "any": float(absent > 0),
        }[self._measure]
        covered = len({*nodes} & truth) / len(truth) if truth else 0.0
        return -invented + self._coverage * covered

    def _truth(self, sample: Response) -> frozenset[str]:
        own = sample.fields.get("objects")
        if own is not None:
            return self._named(own)
        key = _image_key(sample)
        if key is None:
            raise InputError("the row has neither objects nor image_id nor the name of its image")
        if key not in self._objects:
            where = "" if self._objects else "; give the option labels or annotations"
            raise InputError(f"nothing says what is in image {key[:60]}{where}")
        return self._objects[key]

    def _named(self, names: Any) -> frozenset[str]:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError("objects is not a list of names")
        nodes = [self._vocabulary.node(name) for name in names]
        if None in nodes:
            unknown = names[nodes.index(None)]
            raise InputError(f"object {unknown[:60]!r} is not in the vocabulary")
        return frozenset(node for node in nodes if node is not None)


def _objects(labels: str | None, annotations: str | None, vocabulary: Vocabulary) -> Objects:
    if labels is not None:
        return read_labels(as_path(labels), vocabulary)
    if annotations is not None:
        folder = as_path(annotations)
        return read_coco(folder, _coco_images(folder), vocabulary)[0]
    return {}


def _coco_images(folder: Path) -> set[str]:
    """List the ids of all images that COCO's annotations are about."""
    found: set[str] = set()
    for path in sorted(folder.glob("instances_*.json")):
        try:
            found |= {str(row["id"]) for row in json.loads(read_text(path))["images"]}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path}: 'images' is not a list of objects with id") from error
    return found


def _image_key(sample: Response) -> str | None:
    """Bring the row's `image_id`, or else the image's file name, to the form that labels use."""
    given = sample.fields.get("image_id")
    if isinstance(given, int | str) and not isinstance(given, bool):
        return image_id(str(given))
    for image in sample.images:
        if isinstance(image, ImageRef) and isinstance(image.data, Path):
            return image_id(image.data.name)
    return None
