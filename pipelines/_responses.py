"""Answers of vision-language models in a file, as samples of rewards."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm.auto import tqdm

from mmalign.config import as_path
from mmalign.data.images import check_header
from mmalign.data.parquet import image_cell
from mmalign.data.schema import BadRow, RowError, read_prompt
from mmalign.data.vlm_records import IMAGE_KEYS
from mmalign.data.vlm_source import file_rows
from mmalign.pipelines._cached import CachedReward
from mmalign.scoring import divide, scores_sets
from mmalign.types import InputError, Response

if TYPE_CHECKING:
    from mmalign.config import OnBadRow

PROMPT_KEYS = ("prompt", "question")
RESPONSE_KEYS = ("response", "answer", "caption", "text")
SCORES = "scores"
BATCH = 256
"""Answers between two movements of the bar; rewards have batch sizes of their own."""

logger = logging.getLogger(__name__)


class Answered(NamedTuple):
    """A row of a file: where it is, as it was written, and what is scored."""

    where: str
    row: Mapping[str, Any]
    prompt: str
    response: Response


class Answers(NamedTuple):
    """The usable rows of a file, and the others."""

    rows: list[Answered]
    bad_rows: list[BadRow]


def read_responses(
    path: str, images: str | None, *, on_bad_row: OnBadRow, max_pixels: int
) -> Answers:
    """Read answers: `prompt` (or `question`), `response` (or `answer`, `caption`), and `image`.

    Args:
        path: .jsonl, .json or .parquet file.
        images: folder that names of images are relative to; the one of the file when omitted.
        on_bad_row: stop at the first bad row, or skip and list them.
        max_pixels: images with more pixels are bad; none is decoded here.

    Raises:
        InputError: if the file or folder is missing, for the first bad row under `stop`, or without
            any good one.
    """
    file = as_path(path)
    root = as_path(images) if images else file.parent
    if not file.is_file() or file.suffix.lower() not in (".jsonl", ".json", ".parquet"):
        raise InputError(f"responses: {path} is not a .jsonl, .json or .parquet file")
    if not root.is_dir():
        raise InputError(f"images: no such folder: {images}")
    found = Answers([], [])
    for _, where, row in file_rows(file):
        try:
            if isinstance(row, RowError):
                raise row
            found.rows.append(_answered(row, where, root, max_pixels))
        except RowError as error:
            found.bad_rows.append(BadRow(where, str(error)))
            if on_bad_row == "stop":
                raise InputError(f"{where}: {error}") from error
    for bad in found.bad_rows:
        logger.warning("skipped: %s", bad)
    if not found.rows:
        raise InputError(f"{path} has no usable row: {found.bad_rows[:1] or 'it is empty'}")
    return found


def score_responses(
    rows: Sequence[Answered], rewards: Mapping[str, CachedReward]
) -> dict[str, list[float]]:
    """Score every answer with every reward, with a bar.

    Raises:
        InputError: naming reward and row, for a score that is not a finite number.
    """
    columns: dict[str, dict[int, float]] = {name: {} for name in rewards}
    whole = any(map(scores_sets, rewards.values()))
    with tqdm(total=len(rows), desc="score", unit="answer") as bar:
        for batch in divide([row.prompt for row in rows], BATCH, whole=whole):
            samples = [rows[number].response for number in batch]
            prompts, names = zip(*((rows[n].prompt, rows[n].where) for n in batch), strict=True)
            for name, reward in rewards.items():
                columns[name].update(zip(batch, reward(samples, prompts, names), strict=True))
            bar.update(len(batch))
    return {name: [own[number] for number in sorted(own)] for name, own in columns.items()}


def _answered(row: Mapping[str, Any], where: str, root: Path, max_pixels: int) -> Answered:
    asked, said = _first(row, PROMPT_KEYS), _first(row, RESPONSE_KEYS)
    prompt = read_prompt({"prompt": row[asked]})
    text = row[said]
    if not isinstance(text, str):
        raise RowError(f"{said} is a {type(text).__name__}, not a text")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RowError(f"{said} is not valid Unicode (a lone surrogate)")
    shown = next((key for key in IMAGE_KEYS if row.get(key)), None)
    cells = [] if shown is None else row[shown] if isinstance(row[shown], list) else [row[shown]]
    images = tuple(image_cell(cell, root, where) for cell in cells)
    for image in images:
        check_header(image, max_pixels)
    used = {asked, said, SCORES, *IMAGE_KEYS}
    fields = {key: value for key, value in row.items() if key not in used}
    return Answered(where, row, prompt, Response(text=text, images=images, fields=fields))


def _first(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    for key in keys:
        if row.get(key) is not None:
            return key
    raise RowError(f"there is no {keys[0]}; there are {', '.join(map(str, row)) or 'no columns'}")
