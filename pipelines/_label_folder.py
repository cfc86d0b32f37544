"""Which images of a folder people compare: what the folder, or a file of prompts, says."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from mmalign.config import as_path
from mmalign.data.files import check_inside, read_jsonl
from mmalign.data.folders import METADATA, ImagefolderPairs
from mmalign.data.images import SUFFIXES, check_header, hash_image
from mmalign.data.labels import LabelGroup, LabelImage
from mmalign.data.listing import NamedImage, list_images, named_images
from mmalign.data.prompts import read_prompts
from mmalign.data.readers import BAR_DELAY
from mmalign.data.schema import CHOSEN_FILE, BadRow, RowError, Tie, content_hash, read_prompt
from mmalign.types import ImageRef, InputError

if TYPE_CHECKING:
    from mmalign.config import PairsLabelConfig

logger = logging.getLogger(__name__)
TABLES = ("scores.jsonl", METADATA)
CANDIDATES = "candidates"


@dataclass
class _Group:
    """Images of one prompt before they have been looked at."""

    prompt: str
    images: list[Path] = field(default_factory=list)


def list_groups(config: PairsLabelConfig) -> list[LabelGroup] | None:
    """List the images to compare, prompt by prompt; the same picture twice counts once.

    Without `prompts` the folder's own `scores.jsonl` (of `pairs build`) or `metadata.jsonl` (of
    `generate`, or of a folder of pairs, which are taken as they are) counts. With it, a `.jsonl`
    that names files replaces those, and plain prompts choose among the folder's own prompts.
    Where the folder has none they say what the folders of `candidates/` are, or, line by line, the
    images in sorted order.

    Returns:
        The groups, or None when neither the folder nor `prompts` says what belongs together.

    Raises:
        InputError: if files are missing or unusable, a prompt has fewer than two different images
            or an image cannot be read (both under `on_bad_row: stop`), or nothing is left.
    """
    root = as_path(config.images)
    if not root.is_dir():
        raise InputError(f"images: {root} is not a folder")
    bad: list[str] = []
    groups = _named_groups(root, config, bad)
    if groups is None:
        return None
    _report(bad, config)  # before images are read, which takes time
    usable = []
    for group in tqdm(groups, desc="read images", unit="prompt", delay=BAR_DELAY):
        problems: list[str] = []
        images = _checked(root, group.images, config.max_pixels, problems)
        if len(images) < 2:
            problems.append(f"fewer than two different images of the prompt {group.prompt!r}")
        else:
            usable.append(LabelGroup(group.prompt, images))
        _report(problems, config)
    if not usable:
        raise InputError(f"{root} has no prompt with two different images to compare")
    return usable


def _named_groups(root: Path, config: PairsLabelConfig, bad: list[str]) -> list[_Group] | None:
    own = next((_inside(root, name) for name in TABLES if (root / name).exists()), None)
    if config.prompts is None:
        return None if own is None else _from_table(root, own, bad)
    prompts = as_path(config.prompts)
    if prompts.suffix == ".jsonl" and "file_name" in _first_keys(prompts):
        return _from_table(root, prompts, bad)
    wanted = list(dict.fromkeys(read_prompts(prompts)))
    if own is not None:
        return _only(_from_table(root, own, bad), wanted, bad)
    if (root / CANDIDATES).is_dir():
        folders = [root / CANDIDATES / content_hash(text.encode()).hex() for text in wanted]
        return [_Group(text, _files(folder)) for text, folder in zip(wanted, folders, strict=True)]
    if not _files(root):
        raise InputError(f"{root} has no images")
    return _by_prompt(list_images(root, prompts))


def _from_table(root: Path, table: Path, bad: list[str]) -> list[_Group]:
    if CHOSEN_FILE in _first_keys(table):
        return _ready_pairs(table, bad)
    rows = []
    for row in named_images(root, table):
        if isinstance(row, BadRow):
            bad.append(str(row))
        else:
            rows.append(row)
    if not rows and not bad:
        raise InputError(f"{table} is empty: give lines with file_name and prompt")
    return _by_prompt(rows)


def _ready_pairs(metadata: Path, bad: list[str]) -> list[_Group]:
    groups = []
    for row in ImagefolderPairs(metadata).rows():
        if isinstance(row, BadRow):
            bad.append(str(row))
        elif not isinstance(row, Tie):
            images = [Path(str(side.data)) for side in (row.chosen, row.rejected)]
            try:
                groups.append(_Group(read_prompt(row.fields), images))
            except RowError as error:
                bad.append(f"{row.where}: {error}")
    return groups


def _by_prompt(rows: Iterable[NamedImage]) -> list[_Group]:
    groups: dict[str, _Group] = {}
    for row in rows:
        groups.setdefault(row.prompt, _Group(row.prompt)).images.append(row.path)
    return list(groups.values())


def _only(groups: Iterable[_Group], wanted: Sequence[str], bad: list[str]) -> list[_Group]:
    known: dict[str, list[_Group]] = {}
    for group in groups:
        known.setdefault(group.prompt.strip(), []).append(group)
    bad += [f"there are no images of the prompt {text!r}" for text in wanted if text not in known]
    return [group for text in wanted for group in known.get(text, [])]


def _checked(
    root: Path, files: Sequence[Path], max_pixels: int, bad: list[str]
) -> list[LabelImage]:
    images: dict[str, LabelImage] = {}
    for file in files:
        try:
            real = check_inside(root, file)
            check_header(ImageRef(real, str(real)), max_pixels)
            key = hash_image(ImageRef(real, str(real))).hex()
        except RowError as error:
            bad.append(f"{file}: {error}")
            continue
        images.setdefault(key, LabelImage(key, real.relative_to(root.resolve()).as_posix()))
    return list(images.values())


def _inside(root: Path, name: str) -> Path:
    try:
        return check_inside(root, root / name)
    except RowError as error:
        raise InputError(str(error)) from error


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def _first_keys(table: Path) -> set[str]:
    for _, record in read_jsonl(table):
        return set() if isinstance(record, RowError) else set(record)
    return set()


def _report(problems: Sequence[str], config: PairsLabelConfig) -> None:
    if problems and config.on_bad_row == "stop":
        raise InputError(f"{problems[0]}; on_bad_row: skip leaves such images out")
    for problem in problems:
        logger.warning("left out: %s", problem)
