"""`mmalign pairs label`: people choose between images in the browser; export of their pairs."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mmalign.config import as_path
from mmalign.data.files import check_inside
from mmalign.data.images import hash_image
from mmalign.data.labels import DATABASE, Labels
from mmalign.data.schema import RowError
from mmalign.data.writers import WriteFormat, write_pairs
from mmalign.pipelines._label_folder import list_groups
from mmalign.pipelines._label_server import check_page, serve
from mmalign.pipelines._listen import say
from mmalign.types import ImageRef, InputError, PreferencePair

if TYPE_CHECKING:
    from mmalign.config import PairsLabelConfig

logger = logging.getLogger(__name__)
SOURCE = "people"


class Decided(NamedTuple):
    """Pairs with a majority, and how many were left out as a tie or for want of their images."""

    pairs: list[PreferencePair]
    ties: int
    missing: int


def run(config: PairsLabelConfig) -> None:
    """Serve the page until interrupted, or write what people decided and end.

    Raises:
        InputError: if the folder, the prompts or the database are unusable, the address is taken,
            or there is nothing to export.
    """
    root = as_path(config.images)
    file = as_path(config.database) if config.database else _own_database(root)
    if config.export is not None:
        if not file.exists():
            raise InputError(f"nobody has judged anything yet: there is no {file}")
        with closing(Labels(file)) as labels:
            export(labels, root, as_path(config.export))
        return
    check_page(config)
    groups = list_groups(config)
    if groups is None and not file.exists():
        raise InputError(
            f"{root} does not say which prompts its images are for: give --prompts FILE"
        )
    with closing(Labels(file)) as labels:
        if groups is not None:
            labels.unlist()
            labels.add(groups, config.pairs_per_prompt)
        else:
            _forget_missing(labels, root)
        serve(labels, root, config, max_pixels=config.max_pixels)
        say(f"export them with: mmalign pairs label {config.images} --export PATH")


def export(labels: Labels, root: Path, target: Path) -> Decided:
    """Write the pairs that people decided, and say how many.

    Args:
        labels: judgements.
        root: folder of the images.
        target: new folder, or a `.parquet` or `.tar` file.

    Raises:
        InputError: if no pair has a majority, or the target cannot be written.
    """
    decided = decide(labels, root)
    left_out = f"{decided.ties} ties and {decided.missing} pairs without their images left out"
    if not decided.pairs:
        raise InputError(f"no pair has a majority in {labels.file}: {left_out}")
    formats: dict[str, WriteFormat] = {".parquet": "parquet", ".tar": "webdataset"}
    write_pairs(decided.pairs, target, formats.get(target.suffix, "imagefolder"))
    say(f"{len(decided.pairs)} pairs in {target}; {left_out}; {agreement_line(labels)}")
    return decided


def decide(labels: Labels, root: Path) -> Decided:
    """Turn votes into pairs: the majority of each pair wins, scores are shares of the votes."""
    pairs = []
    ties = missing = 0
    for tally in labels.tallies():
        if tally.decision is None:
            ties += 1
            continue
        chosen, rejected = tally.decision
        images = [_image(labels, root, image) for image in tally.decision]
        if images[0] is None or images[1] is None:
            missing += 1
            continue
        better, worse = tally.share(chosen), tally.share(rejected)
        pairs.append(
            PreferencePair(
                pair_id=tally.pair.key,
                prompt=tally.pair.prompt,
                chosen=images[0],
                rejected=images[1],
                score_chosen=better,
                score_rejected=worse,
                margin=better - worse,
                source=SOURCE,
            )
        )
    return Decided(pairs, ties, missing)


def agreement_line(labels: Labels) -> str:
    """Say how far people agree, in one line."""
    found = labels.agreement()
    if found.share is None:
        return "no pair was judged by two people"
    kappa = "" if found.kappa is None else f", Fleiss' kappa {found.kappa:.2f}"
    return f"people agree on {found.share:.0%} of {found.pairs} pairs judged by several{kappa}"


def _own_database(root: Path) -> Path:
    """Refuse links that come with a folder of images: what is judged would be written elsewhere."""
    file = root / DATABASE
    for path in (file, *(file.with_name(f"{DATABASE}-{end}") for end in ("wal", "shm", "journal"))):
        if path.is_symlink():
            raise InputError(f"{path} is a link: remove it, or name a file with --database")
    return file


def _image(labels: Labels, root: Path, key: str) -> ImageRef | None:
    """Find an image that is still what people saw."""
    try:
        file = check_inside(root, root / str(labels.path(key)))
        image = ImageRef(file, str(file))
        return image if hash_image(image).hex() == key else None
    except RowError:
        return None


def _forget_missing(labels: Labels, root: Path) -> None:
    """Stop showing pairs whose images are gone, in a folder that is not listed anew."""
    for image in labels.images():
        if _image(labels, root, image.hash) is None:
            logger.warning("left out: %s is missing or has changed", root / image.path)
            labels.unlist(image.hash)
