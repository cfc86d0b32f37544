"""Which format pairs have."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from mmalign.config import as_path
from mmalign.data.files import check_inside, matching_files, read_jsonl
from mmalign.data.folders import (
    METADATA,
    Hpdv2Pairs,
    ImagefolderPairs,
    WinLosePairs,
    win_lose_folders,
)
from mmalign.data.parquet import ParquetPairs, has_pickapic_columns
from mmalign.data.schema import CHOSEN_FILE, PairSource, RowError
from mmalign.data.webdataset import COMPRESSED, WebdatasetPairs
from mmalign.types import InputError

ANNOTATIONS = ("train.json", "test.json")
SPLIT_NAME = re.compile(r"(.+)-\d+-of-\d+$")
LOOKED_FOR = (
    "*.parquet, *.tar, metadata.jsonl with chosen_file_name and rejected_file_name, "
    "train.json or test.json (HPDv2), or folders w/ and l/ (win/ and lose/, chosen/ and rejected/)"
)


def open_source(path: str, format: str = "auto") -> PairSource:
    """Find out what is at `path` and open it.

    Args:
        path: file, folder, `pkg://` path, or pattern of shards such as `folder/train-*.parquet`
            or `folder/{000..010}.tar`.
        format: a format's name, or `auto`. A folder of HPDv2 means its `train.json`; name
            `test.json` to read that.

    Raises:
        InputError: if there is nothing, or several formats fit.
    """
    if not path:
        raise InputError("the path of the pairs is missing: set pairs.path (or --path)")
    place = as_path(path)
    if any(sign in place.name for sign in "*?[{") and not place.exists():
        files = matching_files(place)
        if not files:
            raise InputError(f"no file matches {path}")
    elif not place.exists():
        raise InputError(f"{path} does not exist")
    elif place.is_file():
        files = [place]
    else:
        return _open_folder(place, format)
    return _open_files(files, format)


def _open_files(files: list[Path], format: str) -> PairSource:
    kinds = {_kind(file) for file in files}
    kind = kinds.pop()
    if kinds or kind is None:
        raise InputError(f"{files[0]} is none of: .parquet, .tar, .jsonl, .json (HPDv2)")
    if format == "auto":
        format = kind
        if kind == "parquet" and has_pickapic_columns(files[0]):
            format = "pickapic"
    if kind != ("parquet" if format == "pickapic" else format):
        raise InputError(f"{files[0]} looks like {kind}, not like the format {format}")
    if kind == "parquet":
        return ParquetPairs(files, "pickapic" if format == "pickapic" else "parquet")
    if kind == "webdataset":
        return WebdatasetPairs(files)
    if len(files) > 1:
        raise InputError(f"{files[0].parent} has {len(files)} matches: name one {kind} file")
    return ImagefolderPairs(files[0]) if kind == "imagefolder" else Hpdv2Pairs(files[0])


def _kind(file: Path) -> str | None:
    name = file.name.lower()
    if name.endswith((".tar", *COMPRESSED)):
        return "webdataset"
    suffixes = {".parquet": "parquet", ".jsonl": "imagefolder", ".json": "hpdv2"}
    return suffixes.get(file.suffix.lower())


def _open_folder(folder: Path, format: str) -> PairSource:
    if format == "auto":
        format = _folder_format(folder)
    if format == "win_lose":
        return WinLosePairs(folder)
    if format == "imagefolder":
        return ImagefolderPairs(_existing(folder, METADATA, folder / METADATA))
    if format == "hpdv2":
        present = [folder / name for name in ANNOTATIONS if (folder / name).exists()]
        return Hpdv2Pairs(_existing(folder, " or ".join(ANNOTATIONS), *present[:1]))
    tars = [f"*{suffix}" for suffix in (".tar", *COMPRESSED)]
    patterns = tars if format == "webdataset" else ["*.parquet"]
    escaped = Path(glob.escape(str(folder)))
    files = sorted(file for pattern in patterns for file in matching_files(escaped / pattern))
    _existing(folder, patterns[0], *files)
    _check_splits(folder, files)
    return _open_files(files, format)


def _folder_format(folder: Path) -> str:
    found = []
    parquet = sorted(folder.glob("*.parquet"))
    if parquet:
        _existing(folder, "*.parquet", *parquet)
        found.append("pickapic" if has_pickapic_columns(parquet[0]) else "parquet")
    if any(file.name.lower().endswith((".tar", *COMPRESSED)) for file in folder.iterdir()):
        found.append("webdataset")
    named = _names_pairs(folder)
    folders = bool(win_lose_folders(folder))
    # A metadata.jsonl that names the pairs may keep its images in folders of any name; one that
    # does not may hold the prompts of win and lose folders.
    if named or (not folders and (folder / METADATA).exists()):
        found.append("imagefolder")
    elif folders:
        found.append("win_lose")
    if any((folder / name).exists() for name in ANNOTATIONS):
        found.append("hpdv2")
    if not found:
        raise InputError(f"no pairs found in {folder}: looked for {LOOKED_FOR}")
    if len(found) > 1:
        formats = " and ".join(found)
        raise InputError(f"{folder} looks like {formats}: choose one with format (--format)")
    return found[0]


def _names_pairs(folder: Path) -> bool:
    if not (folder / METADATA).exists():
        return False
    metadata = _existing(folder, METADATA, folder / METADATA)
    for _, record in read_jsonl(metadata):
        if not isinstance(record, RowError):
            return CHOSEN_FILE in record
    return False


def _existing(folder: Path, wanted: str, *files: Path) -> Path:
    if not files:
        raise InputError(f"{folder} has no {wanted}")
    for file in files:
        try:
            check_inside(folder, file)
        except RowError as error:
            raise InputError(str(error)) from error
    return files[0]


def _check_splits(folder: Path, files: list[Path]) -> None:
    splits = {match[1] for file in files if (match := SPLIT_NAME.match(file.stem))}
    if len(splits) > 1:
        names = ", ".join(sorted(splits))
        raise InputError(
            f"{folder} has the splits {names}: choose one, such as {folder}/{min(splits)}-*"
        )
