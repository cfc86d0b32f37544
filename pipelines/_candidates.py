"""Candidates for pairs: images sampled for each prompt, or images that exist already."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm.auto import tqdm

from mmalign.config import PairsConfig, as_path
from mmalign.data.files import read_jsonl, read_text, resolve_inside, write_bytes
from mmalign.data.images import decode, hash_image, save_png
from mmalign.data.prompts import read_prompts
from mmalign.data.schema import BadRow, RowError, content_hash, read_prompt, require
from mmalign.randomness import derive_seed
from mmalign.types import ImageRef, InputError

if TYPE_CHECKING:
    from mmalign.config import PairsBuildConfig
    from mmalign.types import ImageAdapter

logger = logging.getLogger(__name__)
FOLDER = "candidates"
MAX_PIXELS = PairsConfig().max_pixels


class Candidate(NamedTuple):
    """An image for a prompt; `name` is relative to the folder of all candidates."""

    name: str
    path: Path
    prompt: str
    seed: int

    @property
    def ref(self) -> ImageRef:
        """The image, not decoded."""
        return ImageRef(self.path, str(self.path))


Group = list[Candidate]
"""All candidates of one prompt."""


def plan_candidates(config: PairsBuildConfig) -> list[Group]:
    """List the candidates to sample, prompt by prompt; a prompt given twice counts once.

    Seeds are keyed by (seed, prompt, index) and files named by (prompt, index), so neither depends
    on the other prompts, and a longer prompt file or more candidates only add images.
    """
    prompts = read_prompts(config.prompts, config.num_prompts)
    unique = list(dict.fromkeys(prompts))
    if len(unique) < len(prompts):
        logger.warning("%d prompts occur more than once", len(prompts) - len(unique))
    folder = as_path(config.output)
    groups = []
    for prompt in unique:
        label = content_hash(prompt.encode()).hex()
        names = [f"{FOLDER}/{label}/{i:03d}.png" for i in range(config.candidates_per_prompt)]
        seeds = [derive_seed(config.sampling.seed, prompt, i) for i in range(len(names))]
        groups.append(
            [Candidate(n, folder / n, prompt, s) for n, s in zip(names, seeds, strict=True)]
        )
    return groups


def list_candidates(config: PairsBuildConfig) -> tuple[list[Group], list[BadRow]]:
    """List existing images by prompt, in the order of the prompt file.

    The file has one JSON object per line, `file_name` relative to the folder and `prompt`.

    Raises:
        InputError: for the first bad line under `on_bad_row: stop`, or without any good one.
    """
    root, table = as_path(str(config.images)), as_path(config.prompts)
    if not root.is_dir():
        raise InputError(f"images folder {root} does not exist")
    if table.suffix != ".jsonl" or not table.is_file():
        raise InputError(f"with images, prompts must be a .jsonl of file_name and prompt: {table}")
    groups: dict[str, Group] = {}
    bad_rows: list[BadRow] = []
    seen: set[str] = set()
    for number, record in read_jsonl(table):
        try:
            candidate = _existing(root, record, seen)
        except RowError as error:
            bad_rows.append(BadRow(f"{table} line {number}", str(error)))
            if config.on_bad_row == "stop":
                raise InputError(str(bad_rows[-1])) from error
            continue
        groups.setdefault(candidate.prompt, []).append(candidate)
    if not groups:
        raise InputError(f"{table} names no usable image")
    return list(groups.values())[: config.num_prompts], bad_rows


def sample_missing(
    groups: Sequence[Group], config: PairsBuildConfig, load: Callable[[], ImageAdapter]
) -> None:
    """Sample the candidates that are not there as valid images yet.

    Args:
        groups: candidates to have.
        config: how they are sampled.
        load: loads the model; not called when nothing is missing.

    Raises:
        InputError: if the folder holds candidates of other settings, or cannot be written.
    """
    _check_settings(config)
    everything = [candidate for group in groups for candidate in group]
    missing = [candidate for candidate in everything if not _is_valid(candidate)]
    if not missing:
        return
    adapter, size = load(), config.sampling.batch_size
    done = len(everything) - len(missing)
    with tqdm(total=len(everything), initial=done, desc="sample candidates", unit="image") as bar:
        for start in range(0, len(missing), size):
            batch = missing[start : start + size]
            prompts, seeds = [c.prompt for c in batch], [c.seed for c in batch]
            images = adapter.sample(prompts, seeds, config.sampling)
            for candidate, image in zip(batch, images, strict=True):
                save_png(image, candidate.path)
            bar.update(len(batch))


def _existing(root: Path, record: dict[str, Any] | RowError, seen: set[str]) -> Candidate:
    if isinstance(record, RowError):
        raise record
    require(record, ("file_name", "prompt"))
    name, prompt = record["file_name"], read_prompt(record)
    path = resolve_inside(root, name)
    if name in seen:
        raise RowError(f"{name!r} is named a second time")
    seen.add(name)
    return Candidate(name, path, prompt, 0)


def _is_valid(candidate: Candidate) -> bool:
    if not candidate.path.exists():
        return False
    try:
        decode(candidate.ref, MAX_PIXELS)
    except RowError as error:
        logger.warning("%s is sampled again: %s", candidate.path, error)
        return False
    return True


def _check_settings(config: PairsBuildConfig) -> None:
    """Refuse to mix candidates of different models or sampling options in one folder."""
    file = as_path(config.output) / FOLDER / "settings.json"
    settings = _settings(config)
    if not file.exists():
        write_bytes(file, json.dumps(settings, indent=1).encode())
        return
    try:
        before = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is damaged: choose another output folder") from error
    if not isinstance(before, dict):
        raise InputError(f"{file} is damaged: choose another output folder")
    for name in sorted({*before, *settings}):
        if before.get(name) != settings.get(name):
            raise InputError(
                f"{file.parent} has candidates sampled with {name} {before.get(name)!r}, not "
                f"{settings.get(name)!r}: choose another output folder"
            )


def _settings(config: PairsBuildConfig) -> dict[str, Any]:
    names = ("model", "family", "revision", "variant", "adapter", "adapter_scale", "dtype")
    sampling = asdict(config.sampling)
    del sampling["batch_size"]
    settings = {name: getattr(config, name) for name in names}
    if config.adapter is not None:
        settings["adapter_files"] = dict(_adapter_files(as_path(config.adapter)))
    return {**settings, **{f"sampling.{name}": value for name, value in sampling.items()}}


def _adapter_files(adapter: Path) -> Iterator[tuple[str, str]]:
    """Hash a local adapter: it may be trained further and keep its path."""
    files = sorted(adapter.glob("*.safetensors")) if adapter.is_dir() else [adapter]
    for file in files:
        if file.is_file():
            yield file.name, hash_image(ImageRef(file, str(file))).hex()
