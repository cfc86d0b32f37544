"""Pairs as image files in folders: `metadata.jsonl`, HPDv2, and `w/` + `l/`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, cast

from mmalign.data.files import (
    UTF8_BOM,
    check_encoding,
    check_inside,
    read_jsonl,
    read_lines,
    read_text,
    reading,
    resolve_inside,
)
from mmalign.data.images import SUFFIXES
from mmalign.data.schema import CHOSEN_FILE, REJECTED_FILE, BadRow, Row, RowError, Tie, require
from mmalign.types import ImageRef, InputError

WIN_LOSE_NAMES = (("w", "l"), ("win", "lose"), ("chosen", "rejected"))
TIE_NAMES = ("tie", "t")
METADATA = "metadata.jsonl"


class FilePairs:
    """A source whose images are files: a row's key is its two image references."""

    def images(self, key: object) -> tuple[ImageRef, ImageRef]:
        """Return the image references, which are the key."""
        return cast("tuple[ImageRef, ImageRef]", key)


class ImagefolderPairs(FilePairs):
    """Rows of `metadata.jsonl`: `prompt`, `chosen_file_name`, `rejected_file_name`.

    File names are relative to the folder of `metadata.jsonl`. The datasets library loads the same
    folder as two image columns.
    """

    def __init__(self, metadata: Path) -> None:
        """Name the metadata file."""
        self.metadata = metadata

    def rows(self) -> Iterator[Row | Tie | BadRow]:
        """List the lines.

        Raises:
            InputError: if the file cannot be read or is not UTF-8.
        """
        for number, record in read_jsonl(self.metadata):
            where = f"{self.metadata} line {number}"
            try:
                if isinstance(record, RowError):
                    raise record
                require(record, ("prompt", CHOSEN_FILE, REJECTED_FILE))
                yield _file_row(
                    where, record, self.metadata.parent, record[CHOSEN_FILE], record[REJECTED_FILE]
                )
            except RowError as error:
                yield BadRow(where, str(error))


class Hpdv2Pairs(FilePairs):
    """HPDv2's annotation files, a JSON list of records.

    `train.json` has `prompt`, two paths in `image_path` (`file_path` in the first release) and
    `human_preference`, 1 for the preferred one. `test.json` has any number of paths and their mean
    `rank`, lower is better; every two images of different rank make a pair, with the negative rank
    as score. Images are looked for in the folder named like the file (`train/`), then beside it.
    """

    def __init__(self, annotations: Path) -> None:
        """Name the annotation file."""
        self.annotations = annotations

    def rows(self) -> Iterator[Row | Tie | BadRow]:
        """List the comparisons of all records.

        Raises:
            InputError: if the file is not a JSON list.
        """
        for number, record in enumerate(self._records(), start=1):
            where = f"{self.annotations} record {number}"
            try:
                if not isinstance(record, dict):
                    raise RowError(f"the record is a {type(record).__name__}, not an object")
                comparisons = _comparisons(record)
            except RowError as error:
                yield BadRow(where, str(error))
                continue
            for comparison in comparisons:
                yield self._row(where, record, *comparison)

    def _row(
        self, where: str, record: Mapping[str, Any], first: int, second: int, many: bool
    ) -> Row | Tie | BadRow:
        place = f"{where}, images {first + 1} and {second + 1}" if many else where
        values = record["rank" if "rank" in record else "human_preference"]
        if values[first] == values[second]:
            return Tie(place)
        by_rank = "rank" in record
        first_wins = (values[first] < values[second]) == by_rank
        winner, loser = (first, second) if first_wins else (second, first)
        fields = dict(record)
        if by_rank:
            fields |= {"score_chosen": -values[winner], "score_rejected": -values[loser]}
        paths = _paths(record)
        try:
            return _file_row(place, fields, self._root(paths[winner]), paths[winner], paths[loser])
        except RowError as error:
            return BadRow(place, str(error))

    def _root(self, name: object) -> Path:
        named = self.annotations.with_suffix("")
        try:
            resolve_inside(named, name)
        except RowError:
            return self.annotations.parent
        return named

    def _records(self) -> list[Any]:
        with reading(self.annotations):
            data = self.annotations.read_bytes()
        check_encoding(self.annotations, data[:4])
        try:
            records = json.loads(data.removeprefix(UTF8_BOM))
        except json.JSONDecodeError as error:
            raise InputError(
                f"{self.annotations} line {error.lineno} is not JSON: {error.msg}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.annotations} is not JSON: {str(error)[:120]}") from error
        if not isinstance(records, list):
            raise InputError(f"{self.annotations} is not a JSON list of comparisons")
        return records


class WinLosePairs(FilePairs):
    """Two folders, `w/` and `l/` (or `win/` and `lose/`, `chosen/` and `rejected/`).

    Files of the same stem make a pair, whatever their suffixes, in sorted order. Prompts come from
    exactly one of: `prompts.jsonl` or `metadata.jsonl` (`file_name`, a stem or file name, `prompt`,
    and optional columns such as scores); `prompts.txt`, one line per stem in sorted order;
    `STEM.txt` beside the winner. Each stem in an optional `tie/` (or `t/`) is a dropped tie.
    """

    def __init__(self, root: Path) -> None:
        """Name the folder that has both.

        Raises:
            InputError: unless exactly one couple of names is there.
        """
        self.root = root
        found = win_lose_folders(root)
        if len(found) != 1:
            raise InputError(f"{root} has {len(found)} couples of folders like w/ and l/: need one")
        self.winners, self.losers = (_folder_inside(root, folder) for folder in found[0])

    def rows(self) -> Iterator[Row | Tie | BadRow]:
        """List the stems of both folders.

        Raises:
            InputError: if prompts are missing or given twice.
        """
        winners, losers = _by_stem(self.winners), _by_stem(self.losers)
        stems = sorted(winners.keys() | losers.keys())
        prompts = self._prompts(stems)
        for stem in stems:
            where = f"{self.root} stem {stem!r}"
            try:
                files = [
                    _only(found.get(stem, []), stem, folder, self.root)
                    for found, folder in ((winners, self.winners), (losers, self.losers))
                ]
                fields = prompts(stem)
            except RowError as error:
                yield BadRow(where, str(error))
                continue
            chosen, rejected = (
                ImageRef(file, f"{where}, {file.parent.name}/{file.name}") for file in files
            )
            yield Row(where, fields, chosen, rejected, (chosen, rejected))
        for name in TIE_NAMES:
            folder = self.root / name
            if folder.is_dir():
                stems = sorted(_by_stem(_folder_inside(self.root, folder)))
                yield from (Tie(f"{folder} stem {stem!r}") for stem in stems)

    def _prompts(self, stems: list[str]) -> _Prompts:
        tables = [self.root / name for name in ("prompts.jsonl", METADATA)]
        sources = [path for path in (*tables, self.root / "prompts.txt") if path.exists()]
        if any(file.suffix == ".txt" for file in self.winners.iterdir()):
            sources.append(self.winners / "STEM.txt")
        if len(sources) != 1:
            found = ", ".join(map(str, sources)) or "none"
            raise InputError(
                f"{self.root} needs one source of prompts: prompts.jsonl, metadata.jsonl, "
                f"prompts.txt or {self.winners.name}/STEM.txt; found {found}"
            )
        source = sources[0]
        if source.suffix == ".jsonl":
            return _Prompts(source, _prompt_rows(_safe(self.root, source)))
        if source.name == "prompts.txt":
            return _Prompts(source, _prompt_lines(_safe(self.root, source), stems))
        texts = {stem: _prompt_file(self.root, self.winners / f"{stem}.txt") for stem in stems}
        return _Prompts(source, texts)


class _Prompts:
    """Columns of each stem, or what is wrong with them."""

    def __init__(self, source: Path, rows: Mapping[str, Mapping[str, object] | RowError]) -> None:
        self.source, self.rows = source, rows

    def __call__(self, stem: str) -> Mapping[str, object]:
        row = self.rows.get(stem)
        if row is None:
            raise RowError(f"{self.source} has no prompt for it")
        if isinstance(row, RowError):
            raise row
        return row


def win_lose_folders(root: Path) -> list[tuple[Path, Path]]:
    """List the couples of winner and loser folders that are there."""
    couples = [(root / winner, root / loser) for winner, loser in WIN_LOSE_NAMES]
    return [couple for couple in couples if all(folder.is_dir() for folder in couple)]


def _file_row(
    where: str, fields: Mapping[str, object], root: Path, chosen: object, rejected: object
) -> Row:
    refs = []
    for side, name in (("chosen", chosen), ("rejected", rejected)):
        refs.append(ImageRef(resolve_inside(root, name), f"{where}, {side}: {name}"))
    return Row(where, fields, refs[0], refs[1], (refs[0], refs[1]))


def _comparisons(record: Mapping[str, Any]) -> list[tuple[int, int, bool]]:
    """List the index pairs of a record after checking that paths and labels belong together."""
    require(record, ["prompt"])
    paths = _paths(record)
    label = "rank" if "rank" in record else "human_preference"
    require(record, [label])
    values = record[label]
    numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
    if not numbers or len(values) != len(paths):
        raise RowError(f"{label} must be one number per image")
    if any(value != value for value in values):
        raise RowError(f"{label} has a value that is not a number")
    if len(paths) < 2 or (label == "human_preference" and len(paths) != 2):
        raise RowError(f"there are {len(paths)} images: a comparison by {label} needs two")
    many = len(paths) > 2
    return [(first, second, many) for first, second in combinations(range(len(paths)), 2)]


def _paths(record: Mapping[str, Any]) -> list[Any]:
    name = "file_path" if "file_path" in record else "image_path"
    require(record, [name])
    if not isinstance(record[name], list):
        raise RowError(f"{name} is not a list")
    return list(record[name])


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    stems: dict[str, list[Path]] = {}
    with reading(folder):
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() in SUFFIXES:
                stems.setdefault(file.stem, []).append(file)
    return stems


def _only(files: list[Path], stem: str, folder: Path, root: Path) -> Path:
    if not files:
        raise RowError(f"{folder.name}/ has no image {stem}.png (or another suffix)")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise RowError(f"{folder.name}/ has {len(files)} images of this stem: {names}")
    return check_inside(root, files[0])


def _prompt_rows(table: Path) -> dict[str, Mapping[str, object] | RowError]:
    rows: dict[str, Mapping[str, object] | RowError] = {}
    for number, record in read_jsonl(table):
        where = f"{table} line {number}"
        if isinstance(record, RowError):
            raise InputError(f"{where}: {record}")
        try:
            require(record, ("file_name", "prompt"))
        except RowError as error:
            raise InputError(f"{where}: {error}") from error
        name = Path(str(record["file_name"]).replace("\\", "/")).name
        stem = Path(name).stem if Path(name).suffix.lower() in SUFFIXES else name
        again = stem in rows
        rows[stem] = RowError(f"{where} names {stem!r} a second time") if again else record
    return rows


def _prompt_lines(file: Path, stems: list[str]) -> dict[str, Mapping[str, object]]:
    lines = read_lines(file)
    if len(lines) != len(stems):
        raise InputError(f"{file} has {len(lines)} lines for {len(stems)} pairs: need one each")
    return {stem: {"prompt": line.strip()} for stem, line in zip(stems, lines, strict=True)}


def _prompt_file(root: Path, file: Path) -> Mapping[str, object] | RowError:
    try:
        return {"prompt": read_text(check_inside(root, file)).strip()}
    except (RowError, InputError) as error:
        return RowError(str(error))


def _folder_inside(root: Path, folder: Path) -> Path:
    if not folder.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{folder} is a link out of {root}: copy the folder")
    return folder


def _safe(root: Path, file: Path) -> Path:
    try:
        return check_inside(root, file)
    except RowError as error:
        raise InputError(str(error)) from error
