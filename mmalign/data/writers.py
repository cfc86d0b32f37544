"""Writing pairs in the formats that are read. Encoded images are copied as they are."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm.auto import tqdm

from mmalign.data.files import atomic_path, write_bytes, write_jsonl, writing
from mmalign.data.folders import METADATA
from mmalign.data.images import image_suffix, read_image_bytes
from mmalign.data.readers import BAR_DELAY, image_of
from mmalign.data.schema import CHOSEN_FILE, OPTIONAL_COLUMNS, REJECTED_FILE, content_hash
from mmalign.types import ImageRef, InputError, PreferencePair

WriteFormat = Literal["imagefolder", "parquet", "webdataset"]
ROW_GROUP = 64
SHARD_SIZE = 1000
ANY_SIZE = 2**62


def write_pairs(
    pairs: Sequence[PreferencePair], path: Path | str, format: WriteFormat = "imagefolder"
) -> None:
    """Write pairs; the file that makes them readable appears last, complete.

    - `imagefolder`: a new or empty folder with `images/` and `metadata.jsonl`;
    - `parquet`: one file, images as structs that the datasets library decodes;
    - `webdataset`: one shard if `path` ends in `.tar`, else a folder of shards of 1,000.

    Args:
        pairs: pairs of images.
        path: file or folder; an existing file is replaced.
        format: one of the three.

    Raises:
        InputError: if the folder is in use, an image cannot be read, or nothing can be written.
    """
    target = Path(path).expanduser()
    if not len(pairs):
        raise InputError(f"there are no pairs to write to {target}")
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"{target} is not empty: choose a new folder")
    bar = tqdm(pairs, desc="write pairs", unit="pair", delay=BAR_DELAY)
    samples = (_sample(pair) for pair in bar)
    if format == "imagefolder":
        _write_imagefolder(samples, target)
    elif format == "parquet":
        _write_parquet(samples, target)
    elif format == "webdataset":
        _write_webdataset(samples, target)
    else:
        raise InputError(f"cannot write {format!r}: use imagefolder, parquet or webdataset")


def write_shard(pairs: Iterable[PreferencePair], file: Path) -> None:
    """Write pairs of images as one webdataset shard, atomically.

    Raises:
        InputError: an image cannot be read, or the file cannot be written.
    """
    _write_shard((_sample(pair) for pair in pairs), file)


class _File(NamedTuple):
    data: bytes
    suffix: str


class _Sample(NamedTuple):
    fields: dict[str, Any]
    chosen: _File
    rejected: _File


def _sample(pair: PreferencePair) -> _Sample:
    values = {name: getattr(pair, name) for name in OPTIONAL_COLUMNS}
    known = {name: value for name, value in values.items() if value is not None}
    chosen, rejected = (image_of(side, pair.pair_id) for side in (pair.chosen, pair.rejected))
    return _Sample({"prompt": pair.prompt, **known}, _file(chosen), _file(rejected))


def _file(ref: ImageRef) -> _File:
    data = read_image_bytes(ref)
    return _File(data, image_suffix(ImageRef(data, ref.where), ANY_SIZE))


def _write_imagefolder(samples: Iterator[_Sample], folder: Path) -> None:
    rows = []
    for sample in samples:
        names = []
        for file in (sample.chosen, sample.rejected):
            name = f"images/{content_hash(file.data).hex()}{file.suffix}"
            if not (folder / name).exists():
                write_bytes(folder / name, file.data)
            names.append(name)
        rows.append({**sample.fields, CHOSEN_FILE: names[0], REJECTED_FILE: names[1]})
    write_jsonl(folder / METADATA, rows)


def _write_parquet(samples: Iterator[_Sample], file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kinds = {"source": pa.string(), "pair_id": pa.string()}
    optional = [(name, kinds.get(name, pa.float64())) for name in OPTIONAL_COLUMNS]
    columns = [("prompt", pa.string()), ("chosen", image), ("rejected", image), *optional]
    features = {name: _feature(str(kind)) for name, kind in columns}
    info = json.dumps({"info": {"features": features}})
    schema = pa.schema(columns, metadata={"huggingface": info})
    with atomic_path(file) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for group in _groups(samples, ROW_GROUP):
            rows = [
                {**s.fields, "chosen": _struct(s.chosen), "rejected": _struct(s.rejected)}
                for s in group
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _feature(kind: str) -> dict[str, str]:
    """Describe a column to the datasets library."""
    if kind.startswith("struct"):
        return {"_type": "Image"}
    return {"_type": "Value", "dtype": kind.replace("double", "float64")}


def _groups(samples: Iterator[_Sample], size: int) -> Iterator[list[_Sample]]:
    while group := list(islice(samples, size)):
        yield group


def _struct(file: _File) -> dict[str, Any]:
    return {"bytes": file.data, "path": None}


def _write_webdataset(samples: Iterator[_Sample], target: Path) -> None:
    if target.suffix == ".tar":
        _write_shard(samples, target)
        return
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(_groups(samples, SHARD_SIZE)):
        _write_shard(shard, target / f"shard-{number:06d}.tar")


def _write_shard(samples: Iterable[_Sample], file: Path) -> None:
    with atomic_path(file) as temporary, tarfile.open(temporary, "w") as archive:
        for number, sample in enumerate(samples):
            table = json.dumps(sample.fields, ensure_ascii=False).encode()
            members = {
                "json": table,
                f"chosen{sample.chosen.suffix}": sample.chosen.data,
                f"rejected{sample.rejected.suffix}": sample.rejected.data,
            }
            for field, data in members.items():
                info = tarfile.TarInfo(f"{number:06d}.{field}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
