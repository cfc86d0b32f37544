"""Pairs as latents and prompt embeddings: encoded once and kept on disk, or on demand.

Both ways encode one image and one prompt at a time with the same code, so they give bitwise the
same tensors, whatever the batch size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmalign.config import PairsConfig
from mmalign.data.images import decode, to_tensor
from mmalign.data.readers import BAR_DELAY, LISTED, describe, image_of
from mmalign.data.schema import PairInfo, RowError, content_hash
from mmalign.data.store import TensorStore
from mmalign.processes import share, together, world_size
from mmalign.types import Condition, ImageAdapter, ImageRef, InputError, PreferencePair

logger = logging.getLogger(__name__)
LAYOUT = "1: center square, bilinear; mean and std per view"
SHARD_ENTRIES = 256
Entry = dict[str, Tensor]


class EncodedPair(NamedTuple):
    """A pair ready for a denoiser, without batch dim.

    Means and standard deviations have shape (V, C, h, w), one row per view: the plain image and,
    with `random_flip`, the mirrored one. `condition` has tensors such as `prompt_embeds` (L, D).
    """

    pair_id: str
    prompt: str
    chosen_mean: Tensor
    chosen_std: Tensor
    rejected_mean: Tensor
    rejected_std: Tensor
    condition: Condition
    margin: float | None


class _Described:
    """What is known of pairs without their images, in order."""

    def __init__(self, infos: Sequence[PairInfo]) -> None:
        self.infos = list(infos)

    def __len__(self) -> int:
        """Count the pairs."""
        return len(self.infos)

    @property
    def pair_ids(self) -> list[str]:
        """Id of each pair."""
        return [info.pair_id for info in self.infos]

    @property
    def prompts(self) -> list[str]:
        """Prompt of each pair."""
        return [info.prompt for info in self.infos]

    @property
    def margins(self) -> list[float | None]:
        """Score margin of each pair, None where unknown."""
        return [info.margin for info in self.infos]

    @property
    def scores(self) -> list[tuple[float | None, float | None]]:
        """Scores of the chosen and the rejected side of each pair."""
        return [(info.score_chosen, info.score_rejected) for info in self.infos]


class LivePairs(_Described):
    """Pairs encoded when they are asked for: nothing on disk, but encoders in every step."""

    def __init__(
        self, pairs: Sequence[PreferencePair], adapter: ImageAdapter, config: PairsConfig
    ) -> None:
        """Hold pairs and the model that encodes them.

        Under `on_bad_row: skip` every image is decoded once now, because a pair cannot be left out
        later.

        Raises:
            InputError: if no pair is left.
        """
        self.adapter, self.config = adapter, config
        infos, self._pairs, self._indices = describe(pairs), pairs, list(range(len(pairs)))
        if config.on_bad_row == "skip":
            bad = _undecodable(pairs, config)
            self._indices = [index for index in self._indices if index not in bad]
            _report(bad, len(infos))
        super().__init__([infos[index] for index in self._indices])
        self.empty_condition = _encode_prompt(adapter, "", config)

    def __getitem__(self, index: int) -> EncodedPair:
        """Encode one pair.

        Raises:
            InputError: naming the image, if it cannot be decoded or encoded.
        """
        pair = self._pairs[self._indices[index]]
        sides = []
        for side in (pair.chosen, pair.rejected):
            ref = image_of(side, pair.pair_id)
            try:
                sides.append(_encode_image(self.adapter, ref, self.config))
            except RowError as error:
                raise InputError(f"{ref.where}: {error}") from error
        condition = _encode_prompt(self.adapter, pair.prompt, self.config)
        return _assemble(self.infos[index], sides[0], sides[1], condition)


class CachedPairs(_Described):
    """Pairs encoded before, read from disk when they are asked for; works in loader workers."""

    def __init__(self, infos: Sequence[PairInfo], store: TensorStore) -> None:
        """Hold what is known of the pairs, and where their tensors are."""
        super().__init__(infos)
        self._store = store
        self.empty_condition: Condition = store.read(_prompt_key(""))

    def __getitem__(self, index: int) -> EncodedPair:
        """Read one pair.

        Raises:
            InputError: if the cache was damaged or removed meanwhile.
        """
        info = self.infos[index]
        return _assemble(
            info,
            self._store.read(info.chosen_hash.hex()),
            self._store.read(info.rejected_hash.hex()),
            self._store.read(_prompt_key(info.prompt)),
        )


def precompute(
    pairs: Sequence[PreferencePair], adapter: ImageAdapter, config: PairsConfig, cache_dir: Path
) -> CachedPairs:
    """Encode every image and prompt once and keep the result in `cache_dir`.

    Entries are found by the hash of image or prompt, in a folder named by the hash of the model's
    frozen parts, resolution and flip. So an image that is part of several pairs is encoded once,
    runs may share a cache, and an interrupted one goes on from the last full shard.

    Args:
        pairs: pairs of images.
        adapter: the model; its encoders are not needed afterwards.
        config: resolution, flip, and what happens to images that cannot be decoded.
        cache_dir: folder of the cache.

    Returns:
        The pairs, without those whose images cannot be decoded under `on_bad_row: skip`.

    Raises:
        InputError: naming the image, if it cannot be decoded under `stop`, or is encoded to numbers
            that are not finite; if no pair is left, or the cache cannot be written.
    """
    infos = describe(pairs)
    folder = cache_dir / _namespace(adapter, config)
    if world_size() > 1:  # each process encodes its share; below, all find everything
        together(lambda: _store_share(pairs, infos, adapter, config, folder))
    store = TensorStore(folder)
    bad = _store_images(pairs, infos, adapter, config, store)
    kept = [info for index, info in enumerate(infos) if index not in bad]
    _report(bad, len(infos))
    _store_prompts(["", *(info.prompt for info in kept)], adapter, config, store)
    return CachedPairs(kept, store)


def _store_share(
    pairs: Sequence[PreferencePair],
    infos: Sequence[PairInfo],
    adapter: ImageAdapter,
    config: PairsConfig,
    folder: Path,
) -> None:
    """Encode what this process is to encode; an image of several pairs belongs to the first."""
    owner: dict[bytes, int] = {}
    for index, info in enumerate(infos):
        for key in (info.chosen_hash, info.rejected_hash):
            owner.setdefault(key, index)
    first = sorted(set(owner.values()))
    mine = share(first)
    store = TensorStore(folder)
    _store_images([pairs[i] for i in mine], [infos[i] for i in mine], adapter, config, store)
    prompts = list(dict.fromkeys(["", *(info.prompt for info in infos)]))
    _store_prompts(share(prompts), adapter, config, store)


def _store_images(
    pairs: Sequence[PreferencePair],
    infos: Sequence[PairInfo],
    adapter: ImageAdapter,
    config: PairsConfig,
    store: TensorStore,
) -> dict[int, str]:
    """Encode the images that are missing; returns what is wrong with bad pairs by index."""
    shard: dict[str, Entry] = {}
    bad: dict[int, str] = {}
    for index, info in enumerate(tqdm(infos, "encode images", unit="pair", delay=BAR_DELAY)):
        keys = [info.chosen_hash.hex(), info.rejected_hash.hex()]
        if all(key in store or key in shard for key in keys):
            continue
        pair = pairs[index]
        for key, side in zip(keys, (pair.chosen, pair.rejected), strict=True):
            if key in store or key in shard:
                continue
            ref = image_of(side, pair.pair_id)
            try:
                shard[key] = _encode_image(adapter, ref, config)
            except RowError as error:
                if config.on_bad_row == "stop":
                    raise InputError(f"{ref.where}: {error}") from error
                bad[index] = f"{ref.where}: {error}"
        if len(shard) >= SHARD_ENTRIES:
            store.write("images", shard)
            shard = {}
    if shard:
        store.write("images", shard)
    return bad


def _store_prompts(
    prompts: Sequence[str], adapter: ImageAdapter, config: PairsConfig, store: TensorStore
) -> None:
    keys = {_prompt_key(prompt): prompt for prompt in prompts}
    missing = [key for key in keys if key not in store]
    with tqdm(total=len(missing), desc="encode prompts", delay=BAR_DELAY) as bar:
        for start in range(0, len(missing), SHARD_ENTRIES):
            shard = {}
            for key in missing[start : start + SHARD_ENTRIES]:
                shard[key] = _encode_prompt(adapter, keys[key], config)
                bar.update()
            store.write("prompts", shard)


def _encode_image(adapter: ImageAdapter, ref: ImageRef, config: PairsConfig) -> Entry:
    """Encode each view on its own to latent moments (V, C, h, w) on CPU."""
    image = to_tensor(decode(ref, config.max_pixels), config.resolution)
    views = [image, image.flip(-1)] if config.random_flip else [image]
    with torch.no_grad():
        moments = [adapter.encode_images(view[None]) for view in views]
    entry = {
        "mean": torch.cat([part.mean for part in moments]).cpu(),
        "std": torch.cat([part.std for part in moments]).cpu(),
    }
    if not all(bool(torch.isfinite(tensor).all()) for tensor in entry.values()):
        raise InputError(
            f"{ref.where}: the autoencoder returned values that are not finite; use dtype float32"
        )
    return entry


def _encode_prompt(adapter: ImageAdapter, prompt: str, config: PairsConfig) -> Condition:
    side = config.resolution
    with torch.no_grad():
        condition = adapter.encode_condition([prompt], height=side, width=side)
    return {name: tensor[0].cpu() for name, tensor in condition.items()}


def _assemble(info: PairInfo, chosen: Entry, rejected: Entry, condition: Condition) -> EncodedPair:
    return EncodedPair(
        pair_id=info.pair_id,
        prompt=info.prompt,
        chosen_mean=chosen["mean"],
        chosen_std=chosen["std"],
        rejected_mean=rejected["mean"],
        rejected_std=rejected["std"],
        condition=condition,
        margin=info.margin,
    )


def _namespace(adapter: ImageAdapter, config: PairsConfig) -> str:
    parts = (LAYOUT, adapter.fingerprint, config.resolution, config.random_flip)
    return content_hash(repr(parts).encode()).hex()


def _prompt_key(prompt: str) -> str:
    return f"prompt-{content_hash(prompt.encode()).hex()}"


def _undecodable(pairs: Sequence[PreferencePair], config: PairsConfig) -> dict[int, str]:
    bad = {}
    for index in tqdm(range(len(pairs)), "check images", unit="pair", delay=BAR_DELAY):
        pair = pairs[index]
        for side in (pair.chosen, pair.rejected):
            ref = image_of(side, pair.pair_id)
            try:
                decode(ref, config.max_pixels)
            except RowError as error:
                bad[index] = f"{ref.where}: {error}"
    return bad


def _report(bad: dict[int, str], count: int) -> None:
    if bad:
        some = "; ".join(list(bad.values())[:LISTED])
        logger.warning("%d of %d pairs skipped, among them: %s", len(bad), count, some)
    if len(bad) == count:
        raise InputError("no pair is left whose images can be read")
