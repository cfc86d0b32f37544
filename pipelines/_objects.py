"""What benchmarks of free descriptions share: words of objects, and which are in which image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.hallucination.captions import Caption
from mmalign.hallucination.objects import Objects, read_coco, read_labels
from mmalign.hallucination.records import Record, check_complete
from mmalign.hallucination.vocabulary import Vocabulary, coco_vocabulary, read_vocabulary
from mmalign.types import InputError

if TYPE_CHECKING:
    from mmalign.config import CaptionBenchmarkConfig


def load_vocabulary(config: CaptionBenchmarkConfig) -> Vocabulary:
    """Read the vocabulary that a configuration names, or take COCO's.

    Raises:
        InputError: if its file cannot be used.
    """
    if config.vocabulary is None:
        return coco_vocabulary()
    return read_vocabulary(Path(config.vocabulary), strip=config.strict == "fixed")


def known_objects(
    config: CaptionBenchmarkConfig,
    captions: Sequence[Caption],
    path: Path,
    vocabulary: Vocabulary,
) -> tuple[Objects, list[str]]:
    """Read the objects of the captions' images.

    A file of labels is the list of images that there must be captions of; COCO's annotations are
    about more images than any benchmark.

    Returns:
        Objects by image, and warnings.

    Raises:
        InputError: naming file and row, for labels that cannot be used, an image without labels, or
            a labelled image without a caption.
    """
    if config.labels is not None and config.annotations is not None:
        raise InputError("give --labels or --annotations, not both: which objects are meant?")
    found = {caption.image: Record(caption.where, {}) for caption in captions}
    if config.labels is not None:
        objects = read_labels(Path(config.labels), vocabulary)
        return objects, check_complete(path, found, list(objects), config.on_missing)
    if config.annotations is not None:
        return read_coco(Path(config.annotations), set(found), vocabulary)
    raise InputError(
        "labels: give --labels FILE ({image_id: [objects]}) or --annotations DIR with COCO's files"
    )
