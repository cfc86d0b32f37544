"""Stages as files: `stages/NAME.jsonl`, one line per question, found again by what it depends on.

While a stage runs, finished questions are appended to `stages/.NAME.partial.jsonl`; when it is done
both become one file in the order of the questions, those that only earlier runs asked last. A run
that is killed goes on from there.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from mmalign.data.files import read_jsonl, write_jsonl, writing
from mmalign.data.images import decode
from mmalign.data.schema import RowError, content_hash
from mmalign.topics.items import Item, Result
from mmalign.topics.stages import Stage
from mmalign.types import InputError

LAYOUT = 1
"""Part of every key: changes when results mean something else."""
UNREADABLE = "images that cannot be read"
Known = dict[str, tuple[str, Result]]
"""Key and result by id of the question."""

logger = logging.getLogger(__name__)


class StageFile:
    """What a stage found out, on disk."""

    def __init__(self, folder: Path, name: str) -> None:
        """Name the files; nothing is read yet."""
        self.path, self.partial = folder / f"{name}.jsonl", folder / f".{name}.partial.jsonl"

    def read(self) -> Known:
        """Read both files; lines that are damaged or cut off do not count."""
        known: Known = {}
        for path in (self.path, self.partial):
            if path.is_file():
                for _, record in read_jsonl(path):
                    if not isinstance(record, RowError) and isinstance(record.get("result"), dict):
                        known[str(record.get("id"))] = (str(record.get("key")), record["result"])
        return known

    def append(self, entries: Known) -> None:
        """Add finished questions to the partial file.

        Raises:
            InputError: if it cannot be written.
        """
        with writing(self.partial):
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            with self.partial.open("ab+") as stream:
                stream.seek(0, os.SEEK_END)
                if stream.tell():
                    stream.seek(-1, os.SEEK_END)
                    if stream.read(1) != b"\n":  # a line that an earlier run did not finish
                        stream.write(b"\n")
                stream.write("".join(_line(*entry) for entry in entries.items()).encode())
                stream.flush()
                os.fsync(stream.fileno())

    def finish(self, entries: Known) -> None:
        """Write the questions in order, atomically, and remove the partial file.

        Raises:
            InputError: if it cannot be written.
        """
        rows = [{"id": name, "key": key, "result": r} for name, (key, r) in entries.items()]
        write_jsonl(self.path, rows)
        with writing(self.partial):
            self.partial.unlink(missing_ok=True)


def stage_key(stage: Stage, item: Item) -> str:
    """Hash everything the result of a stage for a question depends on."""
    inputs = {name: item.results[name] for name in stage.needs}
    parts = [LAYOUT, stage.name, item.prompt, item.image_hash, stage.options(item), inputs]
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return content_hash(text.encode("utf-8", "surrogatepass")).hex()


def run_stage(stage: Stage, items: Sequence[Item], folder: Path) -> None:
    """Run a stage for the questions it has no result of, and give every question its result.

    Says before it starts what it costs, and shows a bar.

    Raises:
        InputError: naming the row, if an image, a model or an endpoint fails, or files cannot be
            written.
    """
    file = StageFile(folder, stage.name)
    live = [item for item in items if item.dropped is None]
    keys = {item.id: stage_key(stage, item) for item in live}
    before, asked = file.read(), {item.id for item in items}
    known = {n: entry for n, entry in before.items() if entry[0] == keys.get(n)}
    others = {n: entry for n, entry in before.items() if n not in asked}  # as under `limit`
    missing = [item for item in live if item.id not in known]
    done = len(live) - len(missing)
    logger.info("%s", describe(stage, missing, done))
    chunk = stage.config.chunk
    bar = tqdm(total=len(live), initial=done, desc=stage.name, unit="question", disable=not live)
    with bar:
        for start in range(0, len(missing), chunk):
            part = missing[start : start + chunk]
            found = _run_part(stage, part)
            fresh = {item.id: (keys[item.id], found[item.id]) for item in part}
            file.append(fresh)
            known |= fresh
            bar.update(len(part))
    file.finish({item.id: known[item.id] for item in live} | others)
    for item in live:
        item.results[stage.name] = known[item.id][1]


def load_stage(stage: Stage, items: Sequence[Item], folder: Path) -> None:
    """Give every question the result that an earlier run of a stage left.

    Raises:
        InputError: if one is missing, or depends on something that has changed since.
    """
    file = StageFile(folder, stage.name)
    known = file.read()
    for item in items:
        if item.dropped is not None:
            continue
        key, result = known.get(item.id, ("", {}))
        if key != stage_key(stage, item):
            state = "was made with other options or inputs" if key else "is missing"
            raise InputError(
                f"{file.path}: the result of question {item.id} {state}; "
                f"run --until {stage.name} first"
            )
        item.results[stage.name] = result


def recall_stage(stage: Stage, items: Sequence[Item], folder: Path) -> bool:
    """Give questions the results that are still valid; returns whether there were any."""
    known = StageFile(folder, stage.name).read()
    found = False
    for item in items:
        if item.dropped is None and all(name in item.results for name in stage.needs):
            key, result = known.get(item.id, ("", {}))
            if key == stage_key(stage, item):
                item.results[stage.name] = result
                found = True
    return found


def describe(stage: Stage, missing: Sequence[Item], done: int) -> str:
    """Say how many questions are to do, how many are done, and what the rest costs."""
    before = f", {done:,} done before" if done else ""
    cost = f": {stage.cost(missing)}" if missing else ""
    return f"{stage.name}: {len(missing):,} questions{before}{cost}"


def losses(items: Sequence[Item]) -> dict[str, dict[str, int]]:
    """Count why questions were dropped, and what was left out of them, by reason."""
    dropped = Counter(item.dropped for item in items if item.dropped is not None)
    lost: Counter[str] = Counter()
    for item in items:
        for result in item.results.values():
            lost.update(result.get("lost", {}))
    return {"dropped": dict(dropped.most_common()), "lost": dict(lost.most_common())}


def _run_part(stage: Stage, part: Sequence[Item]) -> dict[str, Result]:
    with _pictures(stage, part) as unreadable:
        good = [item for item in part if item.id not in unreadable]
        found = stage.run(good) if good else []
    results: dict[str, Result] = dict(zip((item.id for item in good), found, strict=True))
    return results | {name: {"dropped": UNREADABLE, "problem": p} for name, p in unreadable.items()}


@contextmanager
def _pictures(stage: Stage, part: Sequence[Item]) -> Iterator[dict[str, Any]]:
    """Decode the images of a few questions for as long as they are needed."""
    unreadable: dict[str, Any] = {}
    try:
        for item in part if stage.sees_image else ():
            try:
                item.picture = decode(item.image, stage.config.max_pixels)
            except RowError as error:
                if stage.config.on_bad_row == "stop":
                    raise InputError(
                        f"{item.where}: {error}; on_bad_row: skip leaves such rows out"
                    ) from error
                logger.warning("skipped %s: %s", item.where, error)
                unreadable[item.id] = str(error)
        yield unreadable
    finally:
        for item in part:
            item.picture = None


def _line(name: str, entry: tuple[str, Result]) -> str:
    row = {"id": name, "key": entry[0], "result": entry[1]}
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
