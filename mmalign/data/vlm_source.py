"""Files of preferences between answers: parquet, JSON lines or a JSON list, in any layout."""

from __future__ import annotations

import glob
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmalign.config import as_path
from mmalign.data.files import check_inside, matching_files, read_jsonl, read_text
from mmalign.data.images import SUFFIXES
from mmalign.data.parquet import (
    UNREADABLE,
    RowCursor,
    first_line,
    image_cell,
    iterate_rows,
    open_parquet,
)
from mmalign.data.schema import BadRow, RowError
from mmalign.data.vlm_records import (
    IMAGE_KEYS,
    VIDEO_KEYS,
    Layout,
    VlmRecord,
    layout_of,
    read_record,
)
from mmalign.types import ImageRef, InputError

LAYOUTS: tuple[Layout, ...] = ("vlm", "trl", "rlhf_v", "swift", "llava")
_SUFFIXES = (".parquet", ".jsonl", ".json")


class Place(NamedTuple):
    """Where a row is: number of its file, and row in it from 0."""

    file: int
    row: int


class VlmRow(NamedTuple):
    """A row as its file gives it, with images that have not been decoded.

    `key` finds the images again.
    """

    where: str
    record: VlmRecord
    images: tuple[ImageRef, ...]
    key: object


class VlmFiles:
    """Rows of files of one layout, a few in memory at a time.

    Images are files below `root`, whose references are a row's key, or encoded bytes in a parquet
    file, which are read again when they are asked for.
    """

    def __init__(self, files: Sequence[Path], layout: Layout, root: Path | None) -> None:
        """Name the files, and the folder that names of images are relative to."""
        self.files, self.layout, self._root = list(files), layout, root
        self._cursor: RowCursor | None = None

    def rows(self) -> Iterator[VlmRow | BadRow]:
        """List the rows of all files.

        Raises:
            InputError: if a file cannot be read.
        """
        for number, file in enumerate(self.files):
            for row, where, record in file_rows(file):
                yield self._row(Place(number, row), where, record)

    def images(self, key: object) -> tuple[ImageRef, ...]:
        """Return the images of a row.

        Raises:
            InputError: if its file changed meanwhile.
        """
        if not isinstance(key, Place):
            assert isinstance(key, tuple)
            return key
        file = self.files[key.file]
        if self._cursor is None or not self._cursor.can_reach(file, key.row):
            with open_parquet(file) as parquet:
                names = parquet.schema_arrow.names
            columns = [name for name in (*IMAGE_KEYS, *VIDEO_KEYS) if name in names]
            self._cursor = RowCursor(file, columns, key.row)
        record = self._cursor.read(key.row)
        where = f"{file} row {key.row + 1}"
        cells = [
            next((_as_list(record[k]) for k in keys if record.get(k)), [])
            for keys in (IMAGE_KEYS, VIDEO_KEYS)
        ]
        try:
            return self._refs(file, where, *cells)
        except RowError as error:
            raise InputError(f"{where}: {error}") from error

    def __getstate__(self) -> dict[str, object]:
        """Leave the open file behind when sent to another process."""
        return {**self.__dict__, "_cursor": None}

    def _row(
        self, place: Place, where: str, record: Mapping[str, Any] | RowError
    ) -> VlmRow | BadRow:
        try:
            if isinstance(record, RowError):
                raise record
            read = read_record(record, self.layout)
            refs = self._refs(self.files[place.file], where, read.images, read.videos)
        except RowError as error:
            return BadRow(where, str(error))
        in_file = any(isinstance(ref.data, bytes) for ref in refs)
        return VlmRow(where, read, refs, place if in_file else refs)

    def _refs(
        self, file: Path, where: str, images: list[object], videos: list[object]
    ) -> tuple[ImageRef, ...]:
        root = self._root or file.parent
        refs = [
            image_cell(cell, root, where if len(images) == 1 else f"{where}, image {i}")
            for i, cell in enumerate(images, start=1)
        ]
        for video in videos:
            refs += _frames(root, video, where)
        return tuple(refs)


def open_vlm_source(path: str, format: str = "auto", images: str | None = None) -> VlmFiles:
    """Find out what is at `path` and open it.

    Args:
        path: file, folder, `pkg://` path, or pattern of files.
        format: a layout, or `auto`.
        images: folder that names of images are relative to; the one of the file when omitted.

    Raises:
        InputError: if there is nothing, or nothing that is preferences between answers.
    """
    files = _files(path)
    found = _layout(files[0])
    if format == "auto":
        if found is None:
            raise InputError(
                f"{files[0]}: no pairs of answers: a row needs prompt, chosen, rejected and image,"
                " or the columns of TRL, RLHF-V, ms-swift or LLaVA"
            )
        format = found
    layout = next((name for name in LAYOUTS if name == format), None)
    if layout is None:
        raise InputError(f"format {format} is not one of pairs of answers: {', '.join(LAYOUTS)}")
    root = None if images is None else as_path(images)
    if root is not None and not root.is_dir():
        raise InputError(f"images: no such folder: {images}")
    return VlmFiles(files, layout, root)


def has_answers(path: str, format: str = "auto") -> bool:
    """Tell whether there are preferences between answers at `path`, rather than between images.

    Raises:
        InputError: if a file cannot be read.
    """
    if format != "auto":
        return format in LAYOUTS
    try:
        files = _files(path)
    except InputError:
        return False  # what is wrong is said by the reader of image pairs
    return _layout(files[0]) is not None


def _files(path: str) -> list[Path]:
    if not path:
        raise InputError("the path of the pairs is missing: set pairs.path (or --path)")
    place = as_path(path)
    if any(sign in place.name for sign in "*?[{") and not place.exists():
        files = matching_files(place)
    elif not place.exists():
        raise InputError(f"{path} does not exist")
    elif place.is_dir():
        files = _in_folder(place)
    else:
        files = [place]
    files = [file for file in files if file.suffix.lower() in _SUFFIXES]
    if not files:
        raise InputError(f"no pairs of answers in {path}: looked for {', '.join(_SUFFIXES)} files")
    return files


def _in_folder(folder: Path) -> list[Path]:
    """List the files of the first kind that the folder has."""
    root = Path(glob.escape(str(folder)))
    for suffix in _SUFFIXES:
        files = matching_files(root / f"*{suffix}")
        for file in files:
            try:
                check_inside(folder, file)
            except RowError as error:
                raise InputError(str(error)) from error
        if files:
            return files
    return []


def _layout(file: Path) -> Layout | None:
    """Recognise the layout by the first readable row."""
    in_parquet = file.suffix.lower() == ".parquet"
    for _, _, record in itertools.islice(file_rows(file), 16):
        if not isinstance(record, RowError):
            return layout_of(record, text_only=not in_parquet)
    return None


def file_rows(file: Path) -> Iterator[tuple[int, str, Mapping[str, Any] | RowError]]:
    """Read the rows of a .parquet, .jsonl or .json file, with their number from 0 and their name.

    Raises:
        InputError: if the file cannot be read.
    """
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        try:
            with open_parquet(file) as parquet:
                names = parquet.schema_arrow.names
                groups = range(parquet.num_row_groups)
                for row, record in enumerate(iterate_rows(parquet, names, groups)):
                    yield row, f"{file} row {row + 1}", record
        except UNREADABLE as error:
            raise InputError(f"{file}: not a readable parquet file: {first_line(error)}") from error
    elif suffix == ".jsonl":
        for number, line in read_jsonl(file):
            yield number - 1, f"{file} line {number}", line
    else:
        yield from _json_records(file)


def _json_records(file: Path) -> Iterator[tuple[int, str, Mapping[str, Any] | RowError]]:
    try:
        content = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: is not JSON: {str(error)[:80]}") from error
    if not isinstance(content, list):
        raise InputError(f"{file}: is a JSON {type(content).__name__}, not a list of rows")
    for row, record in enumerate(content):
        where = f"{file} item {row + 1}"
        if isinstance(record, dict):
            yield row, where, record
        else:
            yield row, where, RowError(f"is a JSON {type(record).__name__}, not an object")


def _frames(root: Path, video: object, where: str) -> list[ImageRef]:
    """List the frames of a video: a folder of images in the order of their names, or a list."""
    if isinstance(video, list):
        return [image_cell(cell, root, f"{where}, frame {i}") for i, cell in enumerate(video, 1)]
    if not isinstance(video, str) or not video.strip() or "\0" in video:
        raise RowError(f"{str(video)[:80]!r} is not the name of a folder of frames")
    folder = root / video
    try:
        real = folder.resolve()
        inside = real.is_relative_to(root.resolve()) and not Path(video).is_absolute()
    except (OSError, RuntimeError) as error:
        raise RowError(f"{video[:200]!r} cannot be looked up: {error}") from error
    if not inside or ".." in video.replace("\\", "/").split("/"):
        raise RowError(f"{video!r} leaves {root}")
    if not real.is_dir():
        raise RowError(f"{folder} is not a folder of frames: extract the frames of the video")
    names = sorted(p for p in real.iterdir() if p.suffix.lower() in SUFFIXES)
    if not names:
        raise RowError(f"{folder} has no frames ({', '.join(SUFFIXES)})")
    return [ImageRef(check_inside(root, name), f"{where}: {name.name}") for name in names]


def _as_list(value: object) -> list[object]:
    return list(value) if isinstance(value, list) else [value]
