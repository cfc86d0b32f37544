"""Folders of images with a file that says which prompt each belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mmalign.data.files import read_jsonl, resolve_inside
from mmalign.data.images import SUFFIXES
from mmalign.data.prompts import read_prompts
from mmalign.data.schema import BadRow, RowError, read_prompt
from mmalign.types import InputError


class NamedImage(NamedTuple):
    """An image file: its name relative to the folder, where it is, and its prompt."""

    file_name: str
    path: Path
    prompt: str


def list_images(images: Path, prompts: Path) -> list[NamedImage]:
    """Match images to prompts.

    A `.jsonl` file names each image (`file_name`, relative to the folder, and `prompt`); any other
    file has one prompt per line for the folder's images in sorted order.

    Raises:
        InputError: if the folder, a file or a key is missing, if counts differ, or if a path leads
            out of the folder.
    """
    if not images.is_dir():
        raise InputError(f"images folder {images} does not exist")
    if prompts.suffix == ".jsonl" and prompts.is_file():
        rows = []
        for row in named_images(images, prompts):
            if isinstance(row, BadRow):
                raise InputError(str(row))
            rows.append(row)
        if not rows:
            raise InputError(f"{prompts} is empty: give lines with file_name and prompt")
        return rows
    names = sorted(item.name for item in images.iterdir() if item.suffix.lower() in SUFFIXES)
    texts = read_prompts(prompts)
    if len(names) != len(texts):
        raise InputError(
            f"{images} has {len(names)} images but {prompts} has {len(texts)} prompts: give one "
            "line per image in sorted order, or a .jsonl with file_name and prompt"
        )
    return [
        NamedImage(name, _inside(images, name), text)
        for name, text in zip(names, texts, strict=True)
    ]


def named_images(images: Path, table: Path) -> Iterator[NamedImage | BadRow]:
    """Read the lines of a `.jsonl` with `file_name`, relative to the folder, and `prompt`.

    Raises:
        InputError: if the file cannot be read.
    """
    for number, record in read_jsonl(table):
        try:
            if isinstance(record, RowError):
                raise record
            name = record.get("file_name")
            yield NamedImage(str(name), resolve_inside(images, name), read_prompt(record))
        except RowError as error:
            yield BadRow(f"{table} line {number}", str(error))


def _inside(images: Path, name: str) -> Path:
    try:
        return resolve_inside(images, name)
    except RowError as error:
        raise InputError(str(error)) from error
