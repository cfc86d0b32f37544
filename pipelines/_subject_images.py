"""The images of everything compared, prompt by prompt, in one folder and one format."""

from __future__ import annotations

import gc
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm.auto import tqdm

from mmalign.adapters import load_adapter
from mmalign.config import as_path
from mmalign.data.files import read_text, write_bytes, writing
from mmalign.data.folders import METADATA
from mmalign.data.images import open_image, save_png
from mmalign.data.listing import NamedImage, list_images
from mmalign.evaluation import plan
from mmalign.pipelines._evaluation import evaluation_prompts
from mmalign.pipelines._pictures import MAX_PIXELS
from mmalign.types import ImageRef, InputError

if TYPE_CHECKING:
    from mmalign.config import EvaluateImageConfig, ModelConfig
    from mmalign.pipelines._subjects import Subject

logger = logging.getLogger(__name__)
ORIGIN = "origin.json"
UNSEEN = ("device", "offline")
"""Options of a model that show in no picture."""
ByPrompt = dict[str, list[NamedImage]]


class Row(NamedTuple):
    """What every subject has one image of; `number` counts the images of its prompt."""

    prompt: str
    number: int
    seed: int


class Plan(NamedTuple):
    """What is compared.

    Attributes:
        rows: prompt by prompt.
        folders: slug of each folder of images -> its image of every row.
        notes: what is not as it was asked for.
    """

    rows: list[Row]
    folders: Mapping[str, list[NamedImage]]
    notes: list[str]


def plan_images(config: EvaluateImageConfig, subjects: Sequence[Subject]) -> Plan:
    """Choose the prompts and images to compare.

    Without a file of prompts those of the first folder count. Folders limit how many images of each
    prompt are compared; what they have beyond that is left out, and both are noted.

    Raises:
        InputError: if there are no prompts, or a folder is unusable or lacks a prompt.
    """
    found = {s.slug: _list_folder(s, s.images) for s in subjects if s.images is not None}
    if config.evaluation.prompts is None and found:
        prompts = list(next(iter(found.values())))[: config.evaluation.num_prompts]
    else:
        prompts = evaluation_prompts(config.evaluation)
    asked, wanted = config.evaluation.images_per_prompt, Counter(prompts)
    notes: list[str] = []
    count = asked
    for subject in subjects:
        if subject.slug in found:
            count = min(count, _images_per_prompt(subject, found[subject.slug], wanted))
    rows = _rows(prompts, count, config.sampling.seed)
    if count < asked:
        notes.append(f"{count} instead of {asked} images of each prompt: the folders have no more")
    for subject in subjects:
        left = sum(map(len, found.get(subject.slug, {}).values())) - len(rows)
        if left > 0:
            notes.append(f"{left} images of {subject.name} are left out: more than is compared")
    chosen = {slug: [own[row.prompt][row.number] for row in rows] for slug, own in found.items()}
    return Plan(rows, chosen, notes)


def make_images(
    subjects: Sequence[Subject], planned: Plan, folder: Path, device: str
) -> list[list[Path]]:
    """Write every subject's images as PNG to `folder/<slug>/`, one model in memory at a time.

    Images that are there already, from the same source and settings, are kept.

    Returns:
        For each subject its file of every row.

    Raises:
        InputError: if a model or an image cannot be used, or a folder not be written.
    """
    made = []
    for subject in subjects:
        files = [folder / subject.slug / f"{row:05d}.png" for row in range(len(planned.rows))]
        _settle_origin(folder / subject.slug, _origin(subject, planned))
        missing = [row for row, file in enumerate(files) if not file.is_file()]
        if not missing:
            logger.info("%s: its %d images are there already", subject.name, len(files))
        elif subject.model is None:
            _copy(subject, planned.folders[subject.slug], files, missing)
        else:
            _sample(subject, subject.model, planned.rows, files, missing, device)
            gc.collect()  # models have cycles, and the next one needs the place
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
        made.append(files)
    return made


def _list_folder(subject: Subject, folder: Path) -> ByPrompt:
    prompts = subject.prompts
    if prompts is None:
        prompts = folder / METADATA
        if not prompts.is_file():
            raise InputError(
                f"subject {subject.name}: {folder} has no {METADATA} that says which image belongs"
                " to which prompt: write one (file_name, prompt), or give its prompts"
            )
    found: ByPrompt = {}
    seen: set[tuple[str, Path]] = set()
    for image in list_images(folder, prompts):
        prompt = image.prompt.strip()
        if (prompt, image.path) in seen:
            raise InputError(f"{prompts}: names {image.file_name} twice for the prompt {prompt!r}")
        seen.add((prompt, image.path))
        found.setdefault(prompt, []).append(image)
    return found


def _images_per_prompt(subject: Subject, found: ByPrompt, wanted: Mapping[str, int]) -> int:
    """Count the images that a folder has of each prompt; `wanted` has how often a prompt occurs."""
    lacking = [prompt for prompt, times in wanted.items() if len(found.get(prompt, ())) < times]
    if lacking:
        others = f" and {len(lacking) - 1} more of {len(wanted)} prompts" if lacking[1:] else ""
        times = wanted[lacking[0]]
        few = "no image" if times == 1 else f"fewer than {times} images"
        raise InputError(
            f"subject {subject.name}: {subject.images} has {few} of {lacking[0]!r}{others}"
        )
    return min(len(found[prompt]) // times for prompt, times in wanted.items())


def _rows(prompts: Sequence[str], count: int, seed: int) -> list[Row]:
    rows: list[Row] = []
    used: Counter[str] = Counter()
    for prompt, row_seed in zip(*plan(prompts, count, seed), strict=True):
        rows.append(Row(prompt, used[prompt], row_seed))
        used[prompt] += 1
    return rows


def _copy(
    subject: Subject, images: Sequence[NamedImage], files: Sequence[Path], missing: Sequence[int]
) -> None:
    """Decode a stranger's files once; what is scored and shown afterwards is plain PNG."""
    for row in tqdm(missing, desc=f"read {subject.name}", unit="image"):
        source = images[row].path
        save_png(open_image(ImageRef(source, str(source)), max_pixels=MAX_PIXELS), files[row])


def _sample(
    subject: Subject,
    model: ModelConfig,
    rows: Sequence[Row],
    files: Sequence[Path],
    missing: Sequence[int],
    device: str,
) -> None:
    adapter = load_adapter(model, device=device, for_training=False)
    size = max(subject.sampling.batch_size, 1)
    with tqdm(total=len(missing), desc=f"sample {subject.name}", unit="image") as bar:
        for start in range(0, len(missing), size):
            batch = missing[start : start + size]
            prompts, seeds = [rows[row].prompt for row in batch], [rows[row].seed for row in batch]
            images = adapter.sample(prompts, seeds, subject.sampling)
            for row, image in zip(batch, images, strict=True):
                save_png(image, files[row])
            bar.update(len(batch))


def _origin(subject: Subject, planned: Plan) -> dict[str, Any]:
    """Describe everything that an image of a subject depends on."""
    if subject.model is None:
        files = [image.path for image in planned.folders[subject.slug]]
        return {"prompts": [row.prompt for row in planned.rows], "files": _stamps(files)}
    model, sampling = asdict(subject.model), asdict(subject.sampling)
    files = [file for name in (subject.model.model, subject.model.adapter) for file in _files(name)]
    return {
        "rows": [list(row) for row in planned.rows],
        "model": {name: value for name, value in model.items() if name not in UNSEEN},
        "sampling": {name: value for name, value in sampling.items() if name != "batch_size"},
        "files": _stamps(files),
    }


def _files(name: str | None) -> list[Path]:
    """List the files behind a local model or adapter; a hub id has none here."""
    path = as_path(name) if name is not None else None
    if path is None or not path.exists():
        return []
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _stamps(files: Sequence[Path]) -> list[list[Any]]:
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _settle_origin(folder: Path, origin: Mapping[str, Any]) -> None:
    """Remove the images of another origin before the first one of this is written."""
    text = json.dumps(origin, ensure_ascii=False, indent=1) + "\n"
    file = folder / ORIGIN
    if file.is_file() and read_text(file) == text:
        return
    with writing(folder):
        for image in folder.glob("*.png"):
            if image.stem.isdecimal():
                image.unlink()
    write_bytes(file, text.encode())
