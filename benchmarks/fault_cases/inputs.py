"""Rows 7 to 9: bad images, bad rows, and names that lead elsewhere."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .harness import Said, Tally, case, mmalign
from .toys import TOYS, png, write_lines

Row = dict[str, Any]
LIMIT = "50000000"


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


def three_commands(pairs: Path, output: Path) -> tuple[Said, Said, Said]:
    """Validate; train with on_bad_row: stop; train with on_bad_row: skip."""
    argv = TOYS.train("mapo", output, f"--pairs.path={pairs}", "--max_steps=2")
    skipping = TOYS.train(
        "mapo",
        output.with_name("skip"),
        f"--pairs.path={pairs}",
        "--max_steps=2",
        "--pairs.on_bad_row=skip",
    )
    return mmalign("pairs", "validate", str(pairs)), mmalign(*argv), mmalign(*skipping)


def refused_everywhere(pairs: Path, output: Path, place: str, words: str, tally: Tally) -> None:
    """Count: listed by validate with its place, stops training, or is skipped and counted."""
    validate, stop, skip = three_commands(pairs, output)
    listed = validate.code == 2 and place in validate.text and words in validate.text
    tally.point(listed, f"validate: {validate.error}")
    tally.point(stop.refuses(place, words), f"stop: {stop.error}")
    skipped = skip.code == 0 and "1 bad rows skipped" in skip.text
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
    "truncated data": (lambda: _encoded(_gradient())[:-900], "cannot be decoded"),
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


@case(7, "images for vision-language models", "named with its row; stop, or skip and count")
def bad_vlm_images(folder: Path, tally: Tally) -> None:
    """The same in pairs of answers."""
    for number, (name, (make, words)) in enumerate(BAD_IMAGES.items()):
        if name == "400 megapixels":
            continue
        pairs = folder / str(number)
        pairs.mkdir()
        rows = [json.loads(line) for line in TOYS.vlm_pairs.read_text().splitlines()]
        for row in rows:
            (pairs / row["image"]).write_bytes((TOYS.vlm_pairs.parent / row["image"]).read_bytes())
        (pairs / "bad.png").write_bytes(make())
        rows[1]["image"] = "bad.png"
        write_lines(pairs / "pairs.jsonl", rows)
        said = mmalign("pairs", "validate", str(pairs / "pairs.jsonl"))
        ok = said.code == 2 and "line 2" in said.text and words in said.text
        tally.point(ok, f"{name}: {said.error}")
        argv = TOYS.train("vlm-dpo", folder / f"{number}-run", "--max_steps=1")
        argv = [*argv, f"--pairs.path={pairs / 'pairs.jsonl'}"]
        tally.point(mmalign(*argv).refuses("line 2"), f"{name}: not refused in training")
        skipped = mmalign(*argv, "--pairs.on_bad_row=skip", "--resume_from_checkpoint=null")
        tally.point(skipped.code == 0, f"{name}, skip: {skipped.error}")
    tally.answers = ["line 2 named by validate and in training; skip trains on the others"]


BAD_ROWS: dict[str, tuple[dict[str, Any] | str, str]] = {
    "missing column": ({"rejected_file_name": "DROP"}, "'rejected_file_name' is missing"),
    "empty prompt": ({"prompt": " "}, "the prompt is empty"),
    "prompt of another type": ({"prompt": 7}, "the prompt is a int"),
    "chosen is rejected": ({"rejected_file_name": "1_0.png"}, "same image"),
    "duplicate pair": (
        {"prompt": "red 0", "chosen_file_name": "0_0.png", "rejected_file_name": "0_1.png"},
        "the same pair as",
    ),
    "missing file": ({"chosen_file_name": "no.png"}, "does not exist"),
    "broken JSON": ('{"prompt": "red 1", ', "not JSON"),
    "JSON that is no object": ("[1, 2]", "not an object"),
    "deep JSON": ("[" * 100_000, "not usable JSON"),
    "NaN score": ({"score_chosen": float("nan")}, "not a finite number"),
    "margin that contradicts": (
        {"score_chosen": 1, "score_rejected": 0, "margin": 3},
        "margin 3 is not",
    ),
    "lone surrogate": (
        '{"prompt": "\\ud800", "chosen_file_name": "1_0.png", "rejected_file_name": "1_1.png"}',
        "lone surrogate",
    ),
}


def _change_line(pairs: Path, number: int, change: dict[str, Any] | str) -> None:
    file = pairs / "metadata.jsonl"
    lines = file.read_text().splitlines()
    if isinstance(change, str):
        lines[number] = change
    else:
        row = {**json.loads(lines[number]), **change}
        lines[number] = json.dumps({k: v for k, v in row.items() if v != "DROP"})
    file.write_text("\n".join(lines) + "\n")


@case(8, "rows that cannot be used", "listed with its line; stop, or skip and count", limit=300)
def bad_rows(folder: Path, tally: Tally) -> None:
    """Every kind of bad row, in validate and in training."""
    for name, (change, words) in BAD_ROWS.items():
        place = folder / name.replace(" ", "-")
        pairs = folder_of_pairs(place / "pairs")
        _change_line(pairs, 1, change)
        refused_everywhere(pairs, place / "run", "line 2", words, tally)


@case(8, "all of them at once", "validate lists every one with its line", quick=True)
def all_bad_rows(folder: Path, tally: Tally) -> None:
    """One file with every kind."""
    pairs = folder_of_pairs(folder / "pairs")
    file = pairs / "metadata.jsonl"
    second = file.read_text().splitlines()[1]
    for number, (change, _) in enumerate(BAD_ROWS.values()):
        with file.open("a") as stream:
            stream.write(second + "\n")
        _change_line(pairs, 4 + number, change)
    said = mmalign("pairs", "validate", str(pairs))
    for number, (name, (_, words)) in enumerate(BAD_ROWS.items()):
        line = f"line {5 + number}"
        found = [text for text in said.text.splitlines() if f"{line}:" in text]
        tally.point(len(found) == 1 and words in found[0], f"{name}: {found}")
    tally.point(said.refuses(f"{len(BAD_ROWS)} bad rows"), said.error)


@case(8, "ties, byte order mark, UTF-16", "ties counted, mark read, UTF-16 refused in one line")
def ties_and_encodings(folder: Path, tally: Tally) -> None:
    """What is no bad row, and what is no row at all."""
    pairs = folder_of_pairs(folder / "pairs")
    _change_line(pairs, 1, {"score_chosen": 1.0, "score_rejected": 1.0})
    for said in three_commands(pairs, folder / "run")[1:]:
        tally.point(said.code == 0 and "1 ties dropped" in said.text, said.error)
    file = pairs / "metadata.jsonl"
    text = file.read_text()
    file.write_text(text, encoding="utf-8-sig")
    said = mmalign("pairs", "validate", str(pairs))
    tally.point(said.code == 0 and "1 ties" in said.text, said.error)
    file.write_text(text, encoding="utf-16")
    tally.refused(mmalign("pairs", "validate", str(pairs)), "UTF-16")
    tally.refused(mmalign(*TOYS.train("mapo", folder / "x", f"--pairs.path={pairs}")), "UTF-16")


NAMES = {
    "parent": "../secret.png",
    "parent inside": "sub/../../secret.png",
    "absolute": "SECRET",
    "UNC": "\\\\host\\share\\a.png",
    "drive": "C:\\a.png",
    "URL": "file:///etc/hostname",
    "backslash parent": "..\\secret.png",
    "link": "link.png",
    "link of a folder": "linked/secret.png",
    "device": "/dev/zero",
    "zero byte": "a\0.png",
}


@case(9, "names in rows of image pairs", "rejected before it is opened", quick=True)
def names_in_rows(folder: Path, tally: Tally) -> None:
    """Names that lead out of the folder, and links."""
    secret = folder / "secret.png"
    secret.write_bytes(png("red"))
    os.chmod(secret, 0)
    for number, (kind, name) in enumerate(NAMES.items()):
        pairs = folder_of_pairs(folder / str(number) / "pairs")
        (pairs.parent / "secret.png").write_bytes(secret.read_bytes())
        (pairs / "link.png").symlink_to(secret)
        (pairs / "linked").symlink_to(folder)
        change = {"chosen_file_name": name.replace("SECRET", str(secret))}
        _change_line(pairs, 1, change)
        before = secret.stat().st_atime_ns
        said = mmalign("pairs", "validate", str(pairs))
        words = ("absolute", "leaves", "link out of", "not a file name")
        found = [t for t in said.text.splitlines() if "line 2:" in t and any(w in t for w in words)]
        ok = said.code == 2 and len(found) == 1 and secret.stat().st_atime_ns == before
        tally.point(ok, f"{kind}: {said.error}")
    tally.answers.append(f"refused: {', '.join(NAMES)}")


@case(9, "names in pairs of answers, answers and frames", "rejected before it is opened")
def names_in_answers(folder: Path, tally: Tally) -> None:
    """The same in images and in folders of frames."""
    (folder / "secret.png").write_bytes(png("red"))
    pairs = folder / "pairs"
    pairs.mkdir()
    (pairs / "link.png").symlink_to(folder / "secret.png")
    (pairs / "linked").symlink_to(folder)
    row = {"prompt": "What?", "chosen": "red", "rejected": "blue"}
    for key in ("image", "videos"):
        for kind, name in NAMES.items():
            name = name.replace("SECRET", str(folder / "secret.png"))
            if key == "videos":
                name = str(Path(name).parent) if "secret" in name else name
            write_lines(pairs / "pairs.jsonl", [{**row, key: [name]}])
            said = mmalign("pairs", "validate", str(pairs / "pairs.jsonl"))
            ok = said.code == 2 and "line 1" in said.text and "Traceback" not in said.text
            tally.point(ok, f"{key} {kind}: {said.error}")
    tally.answers.append("line 1 refused")


MEMBERS: dict[str, Callable[[tarfile.TarInfo], None]] = {
    "parent": lambda info: setattr(info, "name", "../a.chosen.png"),
    "absolute": lambda info: setattr(info, "name", "/tmp/a.chosen.png"),
    "symbolic link": lambda info: _link(info, tarfile.SYMTYPE),
    "hard link": lambda info: _link(info, tarfile.LNKTYPE),
    "device": lambda info: setattr(info, "type", tarfile.CHRTYPE),
    "pipe": lambda info: setattr(info, "type", tarfile.FIFOTYPE),
}


def _link(info: tarfile.TarInfo, kind: bytes) -> None:
    info.type, info.linkname, info.size = kind, "/etc/hostname", 0


@case(9, "members of tar shards", "refused in one line; nothing is extracted", quick=True)
def tar_members(folder: Path, tally: Tally) -> None:
    """Members that would leave the folder or that are links or devices."""
    for number, (kind, change) in enumerate(MEMBERS.items()):
        place = folder / str(number)
        place.mkdir()
        with tarfile.open(place / "pairs.tar", "w") as archive:
            for name, data in (
                ("a.chosen.png", png("red")),
                ("a.rejected.png", png("blue")),
                ("a.json", b'{"prompt": "red"}'),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                if "chosen" in name:
                    change(info)
                archive.addfile(info, io.BytesIO(data))
        said = mmalign("pairs", "validate", str(place / "pairs.tar"))
        left = sorted(p.name for p in place.iterdir())
        ok = said.code == 2 and "Traceback" not in said.text and left == ["pairs.tar"]
        tally.point(ok, f"{kind}: {said.error}, {left}")
    tally.answers.append(f"refused: {', '.join(MEMBERS)}")


@case(9, "shards, metadata and checkpoints that are links", "refused: a link out of the folder")
def linked_files(folder: Path, tally: Tally) -> None:
    """Files that a folder of strangers has instead of its own."""
    outside = folder_of_pairs(folder / "outside") / "metadata.jsonl"
    pairs = folder_of_pairs(folder / "pairs")
    (pairs / "metadata.jsonl").unlink()
    (pairs / "metadata.jsonl").symlink_to(outside)
    tally.refused(mmalign("pairs", "validate", str(pairs)), "link out of")
    shards = folder / "shards"
    shards.mkdir()
    (shards / "a.tar").symlink_to(outside)
    tally.refused(mmalign("pairs", "validate", str(shards)), "link out of")
    output = folder / "run"
    mmalign(*TOYS.train("mapo", output, "--max_steps=2"))
    path = output / "checkpoints" / "checkpoint-2"
    moved = folder / "state.json"
    (path / "state.json").rename(moved)
    (path / "state.json").symlink_to(moved)
    tally.refused(mmalign(*TOYS.train("mapo", output)), "checkpoints are damaged")


@case(9, "names in files that are scored", "rejected before it is opened")
def names_in_scores(folder: Path, tally: Tally) -> None:
    """`mmalign score` and `pairs label` read metadata as well."""
    (folder / "secret.png").write_bytes(png("red"))
    for name in ("../secret.png", str(folder / "secret.png"), "link.png"):
        images = folder / "images"
        images.mkdir(exist_ok=True)
        (images / "link.png").unlink(missing_ok=True)
        (images / "link.png").symlink_to(folder / "secret.png")
        write_lines(images / "metadata.jsonl", [{"file_name": name, "prompt": "red"}])
        argv = ["score", f"--images={images}", f"--prompts={images / 'metadata.jsonl'}"]
        said = mmalign(*argv, "--reward=brightness", f"--output={folder / 'scores.parquet'}")
        tally.point(said.code == 2 and "Traceback" not in said.text, said.error)
        said = mmalign("pairs", "label", str(images), "--port=0", seconds=20)
        tally.point(said.code == 2 and "Traceback" not in said.text, said.error)
