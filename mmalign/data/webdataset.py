"""Pairs in webdataset shards: plain tar files, indexed once and then read by offset.

A sample is the members that share a name up to the first dot: `KEY.json` (the columns of a row) or
`KEY.txt` (the prompt), `KEY.chosen.png` and `KEY.rejected.png`, or another image suffix. Nothing is
ever extracted.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast

from mmalign.data.files import MAX_LINE_BYTES, UTF8_BOM
from mmalign.data.images import SUFFIXES
from mmalign.data.schema import CHOSEN, REJECTED, BadRow, Row, RowError, Tie, read_prompt
from mmalign.types import ImageRef, InputError

MAX_IMAGE_BYTES = 2**28
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")


class Member(NamedTuple):
    """Bytes of a tar member: number of the shard, offset, size, and the member's name."""

    shard: int
    offset: int
    size: int
    name: str


class WebdatasetPairs:
    """Shards of samples; images are read from their place in the shard when asked for."""

    def __init__(self, shards: Sequence[Path]) -> None:
        """Name the shards.

        Raises:
            InputError: if one is compressed, which leaves no offsets to read from.
        """
        self.shards = list(shards)
        for shard in self.shards:
            if shard.name.lower().endswith(COMPRESSED):
                raise InputError(f"{shard} is compressed: unpack it to a plain .tar first")

    def rows(self) -> Iterator[Row | Tie | BadRow]:
        """List the samples of all shards, in order of their first member."""
        for number, shard in enumerate(self.shards):
            samples: dict[str, dict[str, Member | RowError]] = {}
            broken: BadRow | None = None
            try:
                self._index(number, shard, samples)
            except (tarfile.TarError, OSError, ValueError, EOFError) as error:
                broken = BadRow(str(shard), f"the tar file is broken: {error}")
            for key, members in samples.items():
                yield self._row(f"{shard} sample {key}", members)
            if broken is not None:
                yield broken

    def images(self, key: object) -> tuple[ImageRef, ImageRef]:
        """Read the two images of a sample.

        Raises:
            InputError: if a shard cannot be read.
        """
        chosen, rejected = cast("tuple[Member, Member]", key)
        try:
            return self._image(chosen), self._image(rejected)
        except RowError as error:
            raise InputError(f"{self.shards[chosen.shard]}: {error}") from error

    def image_row(self, key: str, members: Mapping[str, Member | RowError]) -> ShardImage | BadRow:
        """Make a row of the members of a sample that has one image."""
        where = f"{self.shards[0]} sample {key}"
        try:
            for member in members.values():
                if isinstance(member, RowError):
                    raise member
            found = [m for name, m in members.items() if f".{name}" in SUFFIXES]
            if len(found) != 1 or not isinstance(found[0], Member):
                raise RowError(f"has {len(found)} images, only {', '.join(members)}")
            if found[0].size > MAX_IMAGE_BYTES:
                raise RowError(f"{found[0].name} has more than {MAX_IMAGE_BYTES} bytes")
            prompt = read_prompt(self._fields(members))
            return ShardImage(key, prompt, self._image(found[0]), found[0])
        except RowError as error:
            return BadRow(where, str(error))

    def image(self, member: Member) -> ImageRef:
        """Read an image by its place.

        Raises:
            InputError: the shard was changed or removed meanwhile.
        """
        try:
            return self._image(member)
        except RowError as error:
            raise InputError(f"{self.shards[member.shard]}: {error}") from error

    def _index(
        self, number: int, shard: Path, samples: dict[str, dict[str, Member | RowError]]
    ) -> None:
        with tarfile.open(shard, "r:") as archive:
            for info in archive:
                if info.isdir():
                    continue
                key, field = _split(info.name)
                sample = samples.setdefault(key, {})
                if field in sample:
                    sample[field] = RowError(f"member {info.name!r} occurs twice")
                else:
                    sample[field] = _check(number, info)

    def _row(self, where: str, members: Mapping[str, Member | RowError]) -> Row | BadRow:
        try:
            for member in members.values():
                if isinstance(member, RowError):
                    raise member
            chosen, rejected = _side(members, CHOSEN), _side(members, REJECTED)
            fields = self._fields(members)
            return Row(
                where, fields, self._image(chosen), self._image(rejected), (chosen, rejected)
            )
        except RowError as error:
            return BadRow(where, str(error))

    def _fields(self, members: Mapping[str, Member | RowError]) -> Mapping[str, object]:
        table, text = members.get("json"), members.get("txt")
        if isinstance(table, Member):
            try:
                fields = json.loads(self._read(table).removeprefix(UTF8_BOM))
            except (ValueError, RecursionError) as error:
                raise RowError(f"{table.name} is not JSON: {str(error)[:120]}") from error
            if not isinstance(fields, dict):
                raise RowError(f"{table.name} is not a JSON object")
            return fields
        if isinstance(text, Member):
            try:
                return {"prompt": self._read(text).removeprefix(UTF8_BOM).decode().strip()}
            except UnicodeDecodeError as error:
                raise RowError(f"{text.name} is not UTF-8") from error
        raise RowError(f"there is no .json or .txt with the prompt, only {', '.join(members)}")

    def _image(self, member: Member) -> ImageRef:
        where = f"{self.shards[member.shard]} member {member.name}"
        return ImageRef(self._read(member), where)

    def _read(self, member: Member) -> bytes:
        if member.name.endswith((".json", ".txt")) and member.size > MAX_LINE_BYTES:
            raise RowError(f"{member.name} has more than {MAX_LINE_BYTES} bytes")
        try:
            with self.shards[member.shard].open("rb") as stream:
                stream.seek(member.offset)
                data = stream.read(member.size)
        except OSError as error:
            raise RowError(f"{member.name} cannot be read: {error.strerror or error}") from error
        if len(data) != member.size:
            raise RowError(f"{member.name} is cut off: the shard is truncated")
        return data


class ShardImage(NamedTuple):
    """One image of a shard with its prompt; `member` says where in the shard it is."""

    key: str
    prompt: str
    image: ImageRef
    member: Member


def stream_images(shard: Path) -> Iterator[ShardImage | BadRow]:
    """Read the images of a shard one after the other, in memory that does not grow with it.

    The members of a sample (`KEY.png` or another image, with the prompt in `KEY.json` or `KEY.txt`)
    have to follow each other, as writers of webdataset shards put them.

    Raises:
        InputError: the shard is compressed or cannot be read.
    """
    source = WebdatasetPairs([shard])
    sample: dict[str, Member | RowError] = {}
    current = ""
    try:
        with tarfile.open(shard, "r:") as archive:
            for info in archive:
                cast(
                    Any, archive
                ).members.clear()  # which would otherwise hold every header read so far
                if info.isdir():
                    continue
                key, field = _split(info.name)
                if sample and key != current:
                    yield source.image_row(current, sample)
                    sample = {}
                current = key
                twice = RowError(f"member {info.name!r} occurs twice")
                sample[field] = twice if field in sample else _check(0, info)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise InputError(f"{shard}: the tar file is broken: {error}") from error
    if sample:
        yield source.image_row(current, sample)


def _split(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), field.lower()


def _check(shard: int, info: tarfile.TarInfo) -> Member | RowError:
    name = info.name.replace("\\", "/")
    if info.islnk() or info.issym():
        return RowError(f"member {info.name!r} is a link: links are refused")
    if not info.isreg() or info.issparse():
        return RowError(f"member {info.name!r} is not a regular file")
    if name.startswith("/") or ".." in PurePosixPath(name).parts or ":" in name[:2]:
        return RowError(f"member {info.name!r} is absolute or has '..': refused")
    return Member(shard, info.offset_data, info.size, info.name)


def _side(members: Mapping[str, Member | RowError], side: str) -> Member:
    names = [f"{side}{suffix}" for suffix in SUFFIXES]
    found = [member for name in names if isinstance(member := members.get(name), Member)]
    if len(found) == 1:
        return found[0]
    if found:
        raise RowError(f"there are {len(found)} {side} images: {', '.join(m.name for m in found)}")
    raise RowError(f"there is no {side} image (such as {side}.png), only {', '.join(members)}")
