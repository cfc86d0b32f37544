"""Row 7: bad images; and what the rows 8 and 9 need to put anything bad into pairs."""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .harness import Said, Tally, case, from_tests, mmalign
from .toys import TOYS, png, write_lines

Change = dict[str, Any] | str


def folder_of_pairs(folder: Path, image: bytes | None = None, name: str = "1_0.png") -> Path:
    """Write four pairs; the first image of the second one is `image`."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(4):
        for side in range(2):
            data = png((50 * number + 20 * side, 10 * side, 0))
            (folder / f"{number}_{side}.png").write_bytes(data)
        rows.append(
            {
                "prompt": f"red {number}",
                "chosen_file_name": f"{number}_0.png",
                "rejected_file_name": f"{number}_1.png",
            }
        )
    if image is not None:
        (folder / name).write_bytes(image)
        rows[1]["chosen_file_name"] = name
    write_lines(folder / "metadata.jsonl", rows)
    return folder


def file_of_answers(folder: Path) -> Path:
    """Copy the pairs of answers about images."""
    shutil.copytree(TOYS.vlm_pairs.parent, folder)
    return folder / TOYS.vlm_pairs.name


def change_line(pairs: Path, number: int, change: Change) -> None:
    """Change columns of a line, `DROP` ones, or put a text in its place; lines count from 0."""
    file = pairs if pairs.is_file() else pairs / "metadata.jsonl"
    lines = file.read_text().splitlines()
    if isinstance(change, str):
        lines[number] = change
    else:
        row = {**json.loads(lines[number]), **change}
        lines[number] = json.dumps({k: v for k, v in row.items() if v != "DROP"})
    file.write_text("\n".join(lines) + "\n")


def three_commands(pairs: Path, output: Path) -> tuple[Said, Said, Said]:
    """Validate; train with on_bad_row: stop; train with on_bad_row: skip."""
    method = "vlm-dpo" if pairs.suffix == ".jsonl" else "mapo"
    more = (f"--pairs.path={pairs}", "--max_steps=2")
    argv = TOYS.train(method, output, *more)
    skipping = TOYS.train(method, output.with_name("skip"), *more, "--pairs.on_bad_row=skip")
    return mmalign("pairs", "validate", str(pairs)), mmalign(*argv), mmalign(*skipping)


def refused_everywhere(pairs: Path, output: Path, place: str, words: str, tally: Tally) -> None:
    """Count: listed by validate with its place, stops training, or is skipped and counted."""
    validate, stop, skip = three_commands(pairs, output)
    listed = validate.code == 2 and place in validate.text and words in validate.text
    tally.point(listed, f"validate: {validate.error}")
    tally.point(stop.refuses(place, words), f"stop: {stop.error}")
    # What is found when it is decoded is counted then.
    counted = re.search(
        r"\b1 (bad rows skipped|of \d+ pairs skipped|pairs dropped, unusable)", skip.text
    )
    skipped = skip.code == 0 and counted is not None and words in skip.text
    tally.point(skipped, f"skip: {skip.error}")
    if stop.refuses(words):
        tally.answers.append(stop.error.partition("line 2: ")[2].partition(";")[0])


def _encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def _raw_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def _gradient() -> Image.Image:
    values = np.linspace(0, 255, 64 * 48 * 3).reshape(48, 64, 3).astype(np.uint8)
    return Image.fromarray(values)


BAD_IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "zero bytes": (lambda: b"", "empty (zero bytes)"),
    "text": (lambda: b"<html>404</html>", "not an image of an allowed format"),
    "truncated in the header": (lambda: png("red")[:20], "header cannot be read"),
    "100 megapixels": (lambda: _raw_png(10_000, 10_000), "more than max_pixels"),
    "400 megapixels": (lambda: _raw_png(20_000, 20_000), "max_pixels"),
    "PDF": (lambda: _encoded(_gradient(), "PDF"), "not an image of an allowed format"),
    "EPS": (lambda: _encoded(_gradient(), "EPS"), "not an image of an allowed format"),
    "PSD": (lambda: b"8BPS\0\1" + b"\0" * 100, "not an image of an allowed format"),
    "FITS": (lambda: b"SIMPLE  =                    T" + b" " * 2850, "not an image of an allowed"),
    "truncated data": (lambda: _cut(_encoded(_gradient())), "cannot be decoded"),
    "truncated JPEG": (lambda: _cut(_encoded(_gradient(), "JPEG")), "cannot be decoded"),
    "damaged data": (lambda: _damaged(_encoded(_gradient())), "cannot be"),
}
GOOD_IMAGES: dict[str, Callable[[], bytes]] = {
    "JPEG named .png": lambda: _encoded(_gradient(), "JPEG"),
    "CMYK": lambda: _encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"),
    "16 bit": lambda: _encoded(Image.fromarray(np.full((16, 16), 40_000, np.uint16))),
    "palette": lambda: _encoded(_gradient().quantize(8)),
    "animated": lambda: _encoded(
        _gradient(), "GIF", save_all=True, append_images=[Image.new("RGB", (64, 48))]
    ),
    "EXIF rotated": lambda: _rotated(),
    "1 x 1": lambda: png("red", (1, 1)),
    "1 x 4000": lambda: png("red", (1, 4000)),
    "transparent": lambda: _encoded(Image.new("RGBA", (16, 16), (255, 0, 0, 100))),
}


def _cut(data: bytes) -> bytes:
    return data[: len(data) * 9 // 10]


def _damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(255 - byte for byte in data[middle : middle + 40]) + data[-40:]


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _encoded(_gradient(), "JPEG", exif=exif)


@case(7, "images that cannot be used", "named with its row; stop, or skip and count", limit=300)
def bad_images(folder: Path, tally: Tally) -> None:
    """Every kind of image that must be refused, in validate and in training."""
    for name, (make, words) in BAD_IMAGES.items():
        place = folder / name.replace(" ", "-")
        pairs = folder_of_pairs(place / "pairs", make())
        refused_everywhere(pairs, place / "run", "line 2", words, tally)


@case(7, "unusual images", "decoded, and trained on", limit=300)
def unusual_images(folder: Path, tally: Tally) -> None:
    """Every kind of image that must be read."""
    for name, make in GOOD_IMAGES.items():
        place = folder / name.replace(" ", "-")
        pairs = folder_of_pairs(place / "pairs", make())
        for said in three_commands(pairs, place / "run"):
            tally.point(said.code == 0, f"{name}: {said.error}")
    tally.answers.append(f"read: {', '.join(GOOD_IMAGES)}")


@case(
    7, "images for vision-language models", "named with its row; stop, or skip and count", limit=300
)
def bad_vlm_images(folder: Path, tally: Tally) -> None:
    """The same in pairs of answers."""
    for number, (make, words) in enumerate(BAD_IMAGES.values()):
        pairs = file_of_answers(folder / str(number))
        (pairs.parent / "bad.png").write_bytes(make())
        change_line(pairs, 1, {"image": "bad.png"})
        refused_everywhere(pairs, folder / f"{number}-run", "line 2", words, tally)
    tally.answers = ["line 2 named by validate and in training; skip trains on the others"]


@case(7, "images that are scored", "named with its file; stop, or skip and count", limit=300)
def bad_scored_images(folder: Path, tally: Tally) -> None:
    """The same in a folder that `mmalign score` reads."""
    for number, (name, (make, words)) in enumerate(BAD_IMAGES.items()):
        images = folder_of_pairs(folder / str(number), make())
        (folder / "prompts.txt").write_text("red\n" * 8)
        argv = ["score", f"--images={images}", f"--prompts={folder / 'prompts.txt'}"]
        argv += ["--reward=brightness", f"--output={folder / f'{number}.parquet'}"]
        stop, skip = mmalign(*argv), mmalign(*argv, "--on_bad_row=skip")
        tally.point(stop.refuses("1_0.png", words), f"{name}: {stop.error}")
        counted = skip.code == 0 and "7 images scored, 1 skipped" in skip.text
        tally.point(counted, f"{name}, skip: {skip.error}")
    tally.answers = ["the file is named; the other seven are scored"]


from_tests(
    7,
    "pixels of unusual images",
    "16 bits scaled, EXIF rotation applied, transparency over white, first frame of an animation",
    "tests/data/test_images.py",
)
