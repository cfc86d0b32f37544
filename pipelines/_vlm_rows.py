"""From samples to what the networks are run on: image variants, text variants, responses.

Rows that share image and text share a prefix. All draws are keyed by (seed, pair, epoch), so that
policy, reference and a resumed run see the same variants.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mmalign.adapters._vlm import VlmFamily
from mmalign.data.schema import RowError
from mmalign.objectives.image_variants import absent, crop_box, masked, masked_rows, noised
from mmalign.objectives.perturb import perturb_generator, perturb_tokens, perturbable_tokens
from mmalign.objectives.vlm_rows import Preset, Response, Row
from mmalign.pipelines._vlm_pairs import EncodedPairs, FeatureCache
from mmalign.randomness import keyed_generator
from mmalign.types import Branches, EncodedVlmPair, ImageFeatures, ImageInputs, InputError

Similarity = Callable[[Sequence[Image.Image], Sequence[str]], Tensor]
"""Tells how much each of L texts says about images, (L,)."""


class Sample(NamedTuple):
    """A pair in an epoch."""

    number: int
    epoch: int


Features = Callable[[], ImageFeatures | None]
"""Computes the features of the images of a prefix."""


@dataclass(frozen=True)
class Group:
    """A prefix with the answers of some rows.

    Attributes:
        prefix_ids: tokens of the prefix (P,).
        answers: tokens (R,) of the answer of each row.
        labels: tokens (R,) that are scored at the places of an answer, where they are others.
        rows: the rows.
        scored: tokens (R,) of each answer that count.
        key: identifies content and draws, for caches; None where an answer depends on the policy.
        features: of the images.
    """

    prefix_ids: Tensor
    answers: tuple[Tensor, ...]
    labels: tuple[Tensor | None, ...]
    rows: tuple[Row, ...]
    scored: tuple[Tensor, ...]
    key: str | None
    features: Features

    @cached_property
    def branches(self) -> Branches:
        """What the networks are run on; images are encoded when it is first asked for."""
        return Branches(self.prefix_ids, self.answers, self.features(), self.labels)


class _Text(NamedTuple):
    """Tokens, which of them count, and what is scored in their places if not they, (L,) each."""

    ids: Tensor
    scored: Tensor
    labels: Tensor | None = None


class RowMaker:
    """Makes the rows of samples."""

    def __init__(
        self,
        adapter: VlmFamily,
        pairs: EncodedPairs,
        features: FeatureCache,
        preset: Preset,
        *,
        seed: int,
        similarity: Similarity | None,
        own_answer: Callable[[Branches], Tensor],
    ) -> None:
        """Remember what rows are made of.

        Args:
            adapter: the model.
            pairs: the pairs.
            features: of their images.
            preset: the method.
            seed: base seed of all draws.
            similarity: for presets that perturb texts.
            own_answer: the policy's likeliest tokens along the answer of a prefix, for `self`.
        """
        self._adapter, self._pairs, self._features = adapter, pairs, features
        self._preset, self._seed = preset, seed
        self._similarity, self._own_answer = similarity, own_answer
        chat = adapter.chat
        self._protected = chat.special_ids
        self._ordinary = torch.tensor(
            sorted(set(chat.tokenizer.get_vocab().values()) - chat.special_ids)
        )
        # The tokenizer's own unknown or mask token says "a word was here"; padding would say that
        # nothing was.
        unknown = (chat.tokenizer.mask_token_id, chat.tokenizer.unk_token_id)
        fallback = chat.tokenizer.encode(" _", add_special_tokens=False)[-1]
        self._mask_id: int = next((i for i in unknown if i is not None), fallback)
        self._similarities = lru_cache(maxsize=4096)(self._token_similarities)

    def groups(self, sample: Sample, rows: Iterable[Row]) -> list[Group]:
        """Make rows of a sample, those that share a prefix together.

        Raises:
            InputError: naming the pair, if it has not what a row needs.
        """
        together: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            together.setdefault((row.image, row.text), []).append(row)
        return [self._group(sample, tuple(members)) for members in together.values()]

    def other(self, sample: Sample) -> Sample:
        """Draw the other pair that a sample is compared with."""
        if len(self._pairs) < 2:
            raise InputError(f"preset {self._preset.name} needs at least two pairs")
        generator = self._generator(sample, "other")
        step = int(torch.randint(1, len(self._pairs), (), generator=generator))
        return sample._replace(number=(sample.number + step) % len(self._pairs))

    def _group(self, sample: Sample, rows: tuple[Row, ...]) -> Group:
        pair = self._pairs[sample.number]
        first = rows[0]
        prefix, features = self._prefix(sample, first)
        answers = [self._answer(sample, row, pair) for row in rows]
        drawn = (self._preset.images, sample.epoch, self._seed, pair.pair_id)
        # Which pair is the other one depends on how many there are, and on their order.
        shown = self._pairs[self.other(sample).number] if first.image == "other" else pair
        parts = (
            None if shown.images is None else shown.images.key,
            first.image,
            None if first.image in ("clean", "absent") else drawn,
            prefix.tolist(),
            [answer.ids.tolist() for answer in answers],
        )
        depends = any(row.response == "self" for row in rows)
        key = hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
        return Group(
            prefix_ids=prefix,
            answers=tuple(answer.ids for answer in answers),
            labels=tuple(answer.labels for answer in answers),
            rows=rows,
            scored=tuple(answer.scored for answer in answers),
            key=None if depends else key,
            features=features,
        )

    def _prefix(self, sample: Sample, row: Row) -> tuple[Tensor, Features]:
        """Make the prefix of a row: tokens, and what computes features of its images."""
        pair = self._pairs[sample.number]
        ids = pair.prefix_ids
        if row.text == "perturbed":
            ids = self._perturbed(sample, "prompt", ids, pair.prefix_text).ids
        if row.image == "clean":
            return ids, lambda: self._features.clean(sample.number)
        if row.image == "other":
            return self._with_other_image(sample)
        if pair.images is None:
            raise InputError(
                f"{self._pairs.pair(sample.number).where}: has no images, which preset"
                f" {self._preset.name} needs"
            )
        return ids, lambda: self._features.encode(self._variant(sample, row))

    def _with_other_image(self, sample: Sample) -> tuple[Tensor, Features]:
        pair, other = (self._pairs.pair(s.number) for s in (sample, self.other(sample)))
        try:
            prefix = self._adapter.replaced_images(pair.prompt, self._adapter.pictures(other))
        except RowError as error:
            raise InputError(f"{other.where}: {error}") from error
        return prefix.ids, lambda: self._features.encode(ImageInputs(prefix.images))

    def _variant(self, sample: Sample, row: Row) -> ImageInputs:
        """Make pixel values worse, as the preset says."""
        settings, generator = self._preset.images, self._generator(sample, row.image)
        if row.image == "cropped":
            return self._cropped(sample, generator)
        tensors = dict(self._pairs.images(sample.number).tensors)
        pixels = tensors["pixel_values"]
        if row.image == "noised":
            changed = noised(pixels, settings.noise_timestep, generator)
        elif row.image == "absent":
            changed = absent(pixels)
        elif pixels.ndim == 2:
            changed = masked_rows(pixels, settings.mask_share, generator)
        else:
            changed = masked(pixels, settings.mask_share, settings.mask_patch, generator)
        return ImageInputs({**tensors, "pixel_values": changed})

    def _cropped(self, sample: Sample, generator: torch.Generator) -> ImageInputs:
        """Cut a part out of each picture and enlarge it to the picture's size."""
        settings, pair = self._preset.images, self._pairs.pair(sample.number)
        parts = []
        for picture in self._adapter.pictures(pair):
            box = crop_box(
                picture.height,
                picture.width,
                settings.crop_min_share,
                settings.crop_max_share,
                generator,
            )
            corners = (box.left, box.top, box.left + box.width, box.top + box.height)
            part = picture.crop(corners)
            parts.append(part.resize(picture.size, Image.Resampling.BILINEAR))
        return ImageInputs(self._adapter.replaced_images(pair.prompt, parts).images)

    def _answer(self, sample: Sample, row: Row, pair: EncodedVlmPair) -> _Text:
        if row.response == "self":
            return _whole(pair.chosen_ids)._replace(labels=self._own(sample))
        if row.response == "other":
            pair = self._pairs[self.other(sample).number]
        ids = _response(pair, row.response)
        if ids is None:
            where = self._pairs.pair(sample.number).where
            raise InputError(
                f"{where}: 'revised' is missing, which preset {self._preset.name} needs"
            )
        if row.text == "perturbed" and self._preset.perturb.scope == "all":
            words = torch.ones(len(ids), dtype=torch.bool)
            return self._perturbed(sample, row.response, ids, words)
        return _whole(ids)

    def _own(self, sample: Sample) -> Tensor:
        """Let the policy say what is likeliest along the chosen answer, under a noised image."""
        prefix, features = self._prefix(sample, Row(image="noised"))
        chosen = self._pairs[sample.number].chosen_ids
        return self._own_answer(Branches(prefix, (chosen,), features()))

    def _perturbed(self, sample: Sample, part: str, ids: Tensor, words: Tensor) -> _Text:
        pair = self._pairs.pair(sample.number)
        changed = perturb_tokens(
            ids,
            perturbable_tokens(ids, words, self._protected),
            self._similarities(sample.number, part),
            settings=self._preset.perturb,
            mask_id=self._mask_id,
            replacement_ids=self._ordinary,
            generator=perturb_generator(self._seed, pair.pair_id, sample.epoch, part),
            where=pair.where,
        )
        return _Text(changed.ids, ~changed.changed)

    def _token_similarities(self, index: int, part: str) -> Tensor:
        """Compare each token of a prefix or an answer with the images, (L,)."""
        assert self._similarity is not None  # `resolve_preset` sees to that
        pair, encoded = self._pairs.pair(index), self._pairs[index]
        ids = encoded.prefix_ids if part == "prompt" else _response(encoded, _as_response(part))
        assert ids is not None
        words = encoded.prefix_text if part == "prompt" else torch.ones(len(ids), dtype=torch.bool)
        try:
            pictures = self._adapter.pictures(pair)
        except RowError as error:
            raise InputError(f"{pair.where}: {error}") from error
        texts = self._adapter.chat.tokenizer.batch_decode(ids[words][:, None])
        values = torch.zeros(len(ids))
        values[words] = self._similarity(pictures, texts).cpu().float()
        return values

    def _generator(self, sample: Sample, purpose: str) -> torch.Generator:
        pair_id = self._pairs[sample.number].pair_id
        return keyed_generator("variant", purpose, self._seed, pair_id, sample.epoch)


def _whole(ids: Tensor) -> _Text:
    return _Text(ids, torch.ones(len(ids), dtype=torch.bool))


def _as_response(part: str) -> Response:
    return "chosen" if part == "chosen" else "rejected"


def _response(pair: EncodedVlmPair, response: Response) -> Tensor | None:
    if response == "rejected":
        return pair.rejected_ids
    return pair.revised_ids if response == "revised" else pair.chosen_ids
