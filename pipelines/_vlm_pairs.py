"""Pairs of answers as tokens, and features of their images, computed once where possible."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import torch
from tqdm.auto import tqdm

from mmalign.adapters._vlm import TooLongError, VlmFamily
from mmalign.config import OnBadRow
from mmalign.data.schema import RowError
from mmalign.types import EncodedVlmPair, ImageFeatures, ImageInputs, InputError, VlmPair

logger = logging.getLogger(__name__)
LISTED = 3
BAR_DELAY = 1.0


class EncodedPairs:
    """Pairs that fit the model, as tokens; their images are read again when they are needed.

    Attributes:
        dropped: why pairs are left out that are too long, each a line.
        bad: what is wrong with pairs whose images cannot be used, under `skip`.
        truncated: pairs of which an answer was shortened.
    """

    def __init__(
        self,
        pairs: Sequence[VlmPair],
        adapter: VlmFamily,
        *,
        max_length: int | None,
        on_bad_row: OnBadRow,
    ) -> None:
        """Encode every pair once.

        Raises:
            InputError: naming the row, for an image or text that cannot be used under `stop`; or
                if no pair is left.
        """
        self._pairs, self._adapter, self._max_length = pairs, adapter, max_length
        self.dropped: list[str] = []
        self.bad: list[str] = []
        self.truncated = 0
        self._indices: list[int] = []
        self._encoded: list[EncodedVlmPair] = []
        self.margins: list[float | None] = []
        for index in tqdm(range(len(pairs)), "encode pairs", unit="pair", delay=BAR_DELAY):
            self._add(index, pairs[index], on_bad_row)
        self._report()

    def __len__(self) -> int:
        """Count the pairs that are left."""
        return len(self._encoded)

    def __getitem__(self, index: int) -> EncodedVlmPair:
        """Return the tokens of a pair; its `images` has the key alone."""
        encoded = self._encoded[index]
        return replace(
            encoded, prefix_ids=encoded.prefix_ids.long(), chosen_ids=encoded.chosen_ids.long()
        )

    @property
    def image_keys(self) -> list[str]:
        """What identifies the images of each pair; its own id where there are none."""
        return [
            (pair.images.key if pair.images is not None else None) or pair.pair_id
            for pair in self._encoded
        ]

    def pair(self, index: int) -> VlmPair:
        """Return what was encoded."""
        return self._pairs[self._indices[index]]

    def images(self, index: int) -> ImageInputs:
        """Read and prepare the images of a pair again.

        Raises:
            InputError: naming the row, if they cannot be read any more.
        """
        pair = self.pair(index)
        try:
            images = self._adapter.encode_pair(pair, max_length=self._max_length).images
        except RowError as error:
            raise InputError(_named(pair, error)) from error
        if images is None:
            raise InputError(f"{pair.where}: has no images, which this method needs")
        return images

    def _add(self, index: int, pair: VlmPair, on_bad_row: OnBadRow) -> None:
        try:
            encoded = self._adapter.encode_pair(pair, max_length=self._max_length)
        except TooLongError as error:
            self.dropped.append(_named(pair, error))
            return
        except RowError as error:
            if on_bad_row == "stop":
                raise InputError(
                    f"{_named(pair, error)}; on_bad_row: skip leaves such rows out"
                ) from error
            self.bad.append(_named(pair, error))
            return
        key = None if encoded.images is None else ImageInputs({}, encoded.images.key)
        self._indices.append(index)
        self._encoded.append(replace(encoded, prefix_ids=encoded.prefix_ids.int(), images=key))
        self.margins.append(pair.margin)
        self.truncated += encoded.truncated

    def _report(self) -> None:
        for what, lines in (("too long", self.dropped), ("unusable", self.bad)):
            if lines:
                some = "; ".join(lines[:LISTED])
                logger.warning("%d pairs dropped, %s: %s", len(lines), what, some)
        if self.truncated:
            logger.warning("%d pairs have answers that were shortened to fit", self.truncated)
        if not self._encoded:
            first = (*self.dropped, *self.bad, "there are none")[0]
            raise InputError(f"no usable pairs are left to train on: {first}")


class FeatureCache:
    """Features of images, the ones used last kept in memory.

    Each prefix is encoded alone, so that what comes out does not depend on what was kept.

    Attributes:
        encoded: images sets that went through the vision tower.
    """

    def __init__(self, adapter: VlmFamily, pairs: EncodedPairs, mib: int) -> None:
        """Keep at most `mib` MiB."""
        self._adapter, self._pairs, self._budget = adapter, pairs, mib * 2**20
        self._kept: OrderedDict[str, ImageFeatures] = OrderedDict()
        self._bytes = 0
        self.encoded = 0

    def clean(self, index: int) -> ImageFeatures | None:
        """Return the features of a pair's own images; None without any.

        Raises:
            InputError: naming the row, if an image cannot be read any more.
        """
        images = self._pairs[index].images
        if images is None:
            return None
        key = images.key or ""
        if key not in self._kept:
            self._keep(key, self.encode(self._pairs.images(index)))
        self._kept.move_to_end(key)
        return self._kept[key]

    @torch.no_grad()
    def encode(self, images: ImageInputs) -> ImageFeatures:
        """Run the frozen vision tower and projector."""
        self.encoded += 1
        return self._adapter.encode_images(images)

    def _keep(self, key: str, features: ImageFeatures) -> None:
        self._kept[key] = features
        self._bytes += _bytes(features)
        while self._bytes > self._budget and len(self._kept) > 1:
            self._bytes -= _bytes(self._kept.popitem(last=False)[1])


def _named(pair: VlmPair, error: RowError) -> str:
    """Say where the pair is, unless what is said of its image begins with that."""
    text = str(error)
    return text if text.startswith(pair.where) else f"{pair.where}: {text}"


def _bytes(features: ImageFeatures) -> int:
    return sum(t.numel() * t.element_size() for t in (features.embeds, *features.deep))
