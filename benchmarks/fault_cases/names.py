"""Row 9: names and links that lead out of a folder."""

from __future__ import annotations

import ctypes
import io
import json
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from .harness import Said, Tally, case, mmalign
from .inputs import change_line, folder_of_pairs
from .toys import TOYS, png, write_lines

IN_OPEN = 0x20
NAMES = {
    "parent": "../secret.png",
    "parent inside": "sub/../../secret.png",
    "absolute": "SECRET",
    "UNC": "\\\\host\\share\\a.png",
    "drive": "C:\\a.png",
    "URL": "file://SECRET",
    "backslash parent": "..\\secret.png",
    "link": "link.png",
    "link of a folder": "linked/secret.png",
    "device": "/dev/zero",
    "zero byte": "a\0.png",
}
WORDS = ("absolute", "leaves", "link out of", "not a file name")
REFUSED = "rejected before it is opened"


class Watched:
    """Tells whether a file has been opened, by whichever process or library (inotify)."""

    def __init__(self, file: Path) -> None:
        """Watch from now on."""
        libc = ctypes.CDLL(None, use_errno=True)
        self._events = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if libc.inotify_add_watch(self._events, os.fsencode(file), IN_OPEN) < 0:
            raise OSError(ctypes.get_errno(), f"cannot watch {file}")

    @property
    def opened(self) -> bool:
        """Whether it has been opened since the last question."""
        try:
            return bool(os.read(self._events, 4096))
        except BlockingIOError:
            return False

    def close(self) -> None:
        """End it."""
        os.close(self._events)


@contextmanager
def traps(pairs: Path) -> Iterator[Watched]:
    """Put a picture beside the folder, and links to it into the folder."""
    secret = pairs.parent / "secret.png"
    secret.write_bytes(png("red"))
    (pairs / "link.png").symlink_to(secret)
    (pairs / "linked").symlink_to(pairs.parent)
    with closing(Watched(secret)) as watched:
        yield watched


def refused(said: Said, place: str, watched: Watched, tally: Tally, kind: str) -> None:
    """Count: the row is named once with the reason, and the secret was not touched."""
    lines = [t for t in said.text.splitlines() if place in t and any(w in t for w in WORDS)]
    opened = watched.opened
    ok = said.code == 2 and len(lines) == 1 and "Traceback" not in said.text and not opened
    tally.point(ok, f"{kind}: {'OPENED; ' if opened else ''}{said.error}")


def _names(folder: Path) -> dict[str, str]:
    secret = str(folder / "secret.png")
    return {kind: name.replace("SECRET", secret) for kind, name in NAMES.items()}


@case(9, "names in rows of image pairs", REFUSED, quick=True)
def names_in_rows(folder: Path, tally: Tally) -> None:
    """Names that lead out of the folder, and links; first a proof that the watch works."""
    for number, (kind, name) in enumerate(_names(folder).items()):
        pairs = folder_of_pairs(folder / str(number) / "pairs")
        with traps(pairs) as watched:
            change_line(
                pairs, 1, {"chosen_file_name": name.replace(str(folder), str(pairs.parent))}
            )
            refused(mmalign("pairs", "validate", str(pairs)), "line 2:", watched, tally, kind)
    with closing(Watched(pairs / "0_0.png")) as watched:
        mmalign("pairs", "validate", str(pairs))
        tally.point(watched.opened, "the watch sees nothing")
    tally.answers.append(f"refused: {', '.join(NAMES)}")


@case(9, "names in rows of image pairs, in training", f"{REFUSED}; skip leaves the row out")
def names_in_training(folder: Path, tally: Tally) -> None:
    """The same with `on_bad_row` stop and skip."""
    pairs = folder_of_pairs(folder / "pairs")
    with traps(pairs) as watched:
        for number, (kind, name) in enumerate(_names(folder).items()):
            change_line(pairs, 1, {"chosen_file_name": name})
            argv = TOYS.train("mapo", folder / f"{number}", f"--pairs.path={pairs}")
            argv.append("--max_steps=1")
            refused(mmalign(*argv), "line 2:", watched, tally, kind)
            said = mmalign(*argv, "--pairs.on_bad_row=skip")
            ok = said.code == 0 and "1 bad rows skipped" in said.text and not watched.opened
            tally.point(ok, f"{kind}, skip: {said.error}")
    tally.answers.append(f"refused or skipped: {', '.join(NAMES)}")


@case(9, "names in parquet, HPDv2 and folders of winners and losers", REFUSED)
def names_in_formats(folder: Path, tally: Tally) -> None:
    """The same in the other formats of image pairs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pairs = folder_of_pairs(folder / "pairs")
    (pairs / "metadata.jsonl").unlink()
    with traps(pairs) as watched:
        for kind, name in _names(folder).items():
            for cell in (name, {"bytes": None, "path": name}):
                other = "0_1.png" if isinstance(cell, str) else {"bytes": None, "path": "0_1.png"}
                columns: dict[str, list[Any]] = {"prompt": ["red"], "chosen": [cell]}
                pq.write_table(pa.table({**columns, "rejected": [other]}), pairs / "a.parquet")
                said = mmalign("pairs", "validate", str(pairs / "a.parquet"))
                refused(said, "row 1", watched, tally, f"parquet, {kind}")
            record = {"prompt": "red", "image_path": [name, "0_1.png"], "human_preference": [1, 0]}
            (pairs / "train.json").write_text(json.dumps([record]))
            said = mmalign("pairs", "validate", str(pairs / "train.json"))
            refused(said, "record 1", watched, tally, f"HPDv2, {kind}")
        tree = folder / "tree"
        for name in ("w", "l"):
            (tree / name).mkdir(parents=True)
            (tree / name / "a.png").symlink_to(folder / "secret.png")
        (tree / "prompts.txt").write_text("red\n")
        said = mmalign("pairs", "validate", str(tree))
        refused(said, "stem 'a'", watched, tally, "link in w/")
    tally.answers.append("refused, both as text and as a struct")


@case(9, "names in pairs of answers and frames of videos", REFUSED)
def names_in_answers(folder: Path, tally: Tally) -> None:
    """The same in images and in folders of frames."""
    pairs = folder / "pairs"
    pairs.mkdir()
    row = {"prompt": "What?", "chosen": "red", "rejected": "blue"}
    with traps(pairs) as watched:
        for key in ("image", "videos"):
            for kind, name in _names(folder).items():
                if key == "videos":
                    name = name.replace("/secret.png", "").replace("\\secret.png", "")
                write_lines(pairs / "pairs.jsonl", [{**row, key: [name]}])
                said = mmalign("pairs", "validate", str(pairs / "pairs.jsonl"))
                opened = watched.opened
                ok = said.code == 2 and "line 1:" in said.text and "Traceback" not in said.text
                tally.point(ok and not opened, f"{key} {kind}: {opened} {said.error}")
                argv = TOYS.train("vlm-dpo", folder / "run", f"--pairs.path={pairs}/pairs.jsonl")
                ok = mmalign(*argv).refuses("line 1:") and not watched.opened
                tally.point(ok, f"{key} {kind}: not refused in training")
    tally.answers.append("line 1 refused by validate and in training")


OUTSIDE = Path(tempfile.gettempdir()) / "a.chosen.png"
MEMBERS: dict[str, Callable[[tarfile.TarInfo], None]] = {
    "parent": lambda info: setattr(info, "name", "../a.chosen.png"),
    "absolute": lambda info: setattr(info, "name", str(OUTSIDE)),
    "drive": lambda info: setattr(info, "name", "C:\\a.chosen.png"),
    "UNC": lambda info: setattr(info, "name", "\\\\host\\share\\a.chosen.png"),
    "symbolic link": lambda info: _link(info, tarfile.SYMTYPE),
    "hard link": lambda info: _link(info, tarfile.LNKTYPE),
    "device": lambda info: setattr(info, "type", tarfile.CHRTYPE),
    "pipe": lambda info: setattr(info, "type", tarfile.FIFOTYPE),
}


def _link(info: tarfile.TarInfo, kind: bytes) -> None:
    info.type, info.linkname, info.size = kind, "../secret.png", 0


def _shard(place: Path, change: Callable[[tarfile.TarInfo], None]) -> Path:
    place.mkdir(parents=True)
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
    return place / "pairs.tar"


@case(9, "members of tar and zip archives", "refused in one line; nothing is extracted", quick=True)
def archive_members(folder: Path, tally: Tally) -> None:
    """Members that would leave the folder or that are links or devices."""
    for number, (kind, change) in enumerate(MEMBERS.items()):
        place = folder / str(number)
        shard = _shard(place / "shards", change)
        (place / "secret.png").write_bytes(png("red"))
        with closing(Watched(place / "secret.png")) as watched:
            said = mmalign("pairs", "validate", str(shard))
            opened = watched.opened
        left = sorted(p.name for p in place.rglob("*"))
        ok = said.code == 2 and "Traceback" not in said.text and not opened
        ok = ok and left == ["pairs.tar", "secret.png", "shards"]
        tally.point(ok and not OUTSIDE.exists(), f"{kind}: {said.error}, {left}")
    with zipfile.ZipFile(folder / "pairs.zip", "w") as archive:
        archive.writestr("../a.chosen.png", png("red"))
    said = mmalign("pairs", "validate", str(folder / "pairs.zip"))
    tally.point(said.refuses("pairs.zip") and not (folder.parent / "a.chosen.png").exists(), "zip")
    tally.answers.append(f"refused: {', '.join(MEMBERS)}, zip")


@case(9, "shards, metadata and checkpoints that are links", "refused: a link out of the folder")
def linked_files(folder: Path, tally: Tally) -> None:
    """Files that a folder of strangers has instead of its own."""
    outside = folder_of_pairs(folder / "outside") / "metadata.jsonl"
    pairs = folder_of_pairs(folder / "pairs")
    (pairs / "metadata.jsonl").unlink()
    (pairs / "metadata.jsonl").symlink_to(outside)
    shards = folder / "shards"
    shards.mkdir()
    (shards / "a.tar").symlink_to(outside)
    with closing(Watched(outside)) as watched:
        for place in (pairs, shards):
            tally.refused(mmalign("pairs", "validate", str(place)), "link out of")
            tally.point(not watched.opened, f"{place} is opened")
    output = folder / "run"
    mmalign(*TOYS.train("mapo", output, "--max_steps=2"))
    path = output / "checkpoints" / "checkpoint-2"
    moved = folder / "state.json"
    (path / "state.json").rename(moved)
    (path / "state.json").symlink_to(moved)
    with closing(Watched(moved)) as watched:
        tally.refused(mmalign(*TOYS.train("mapo", output)), "checkpoints are damaged")
        tally.point(not watched.opened, "the link is opened")


@case(9, "files of a run that are links", "replaced, never written through")
def linked_outputs(folder: Path, tally: Tally) -> None:
    """A run's folder, continued, in which a stranger has put links in the place of files."""
    output = folder / "run"
    whole = mmalign(*TOYS.train("mapo", output, "--max_steps=2"))
    assert whole.code == 0, whole.error
    victim = folder / "victim"
    victim.write_text("precious")
    names = [path.relative_to(output) for path in output.rglob("*") if path.is_file()]
    names = [name for name in names if name.parts[0] != "checkpoints"]
    names += [Path(name) for name in (".tmp-metrics.jsonl", "checkpoints/.tmp-4")]
    for name in names:
        (output / name).unlink(missing_ok=True)
        (output / name).symlink_to(victim)
    said = mmalign(*TOYS.train("mapo", output, "--max_steps=4"))
    ok = victim.read_text() == "precious" and (said.code == 0 or said.refuses())
    tally.point(ok, f"{said.error}: {victim.read_bytes()[:60]!r}")
    tally.answers.append(f"{len(names)} links replaced" if said.code == 0 else said.error)


@case(9, "names in files that are scored, paired and labelled", REFUSED)
def names_in_scores(folder: Path, tally: Tally) -> None:
    """`score`, `pairs build` and `pairs label` read metadata as well."""
    images = folder / "images"
    images.mkdir()
    with traps(images) as watched:
        for kind, name in _names(folder).items():
            rows = [{"file_name": name, "image": name, "prompt": "red", "response": "red"}]
            write_lines(images / "metadata.jsonl", rows * 2)
            table, output = f"{images}/metadata.jsonl", f"--output={folder}/out"
            score = ("score", f"--images={images}")
            rewards = '--rewards=[{"name": "brightness"}]'
            lengths = '--rewards=[{"name": "length"}]'
            for argv in (
                (*score, f"--prompts={table}", "--reward=brightness", output),
                ("score", f"--responses={table}", "--reward=length", f"{output}.jsonl"),
                ("pairs", "build", f"--images={images}", f"--prompts={table}", rewards, output),
                ("pairs", "build", f"--responses={table}", lengths, output),
                ("pairs", "label", str(images), "--port=0"),
            ):
                said = mmalign(*argv, seconds=20)
                opened = watched.opened
                ok = said.code == 2 and "Traceback" not in said.text and not opened
                ok = ok and any(word in said.error for word in WORDS)
                tally.point(ok, f"{argv[:2]} {kind}: {opened} {said.error}")
    tally.answers.append("refused by score, pairs build and pairs label")


@case(9, "database of labels", "no link is followed, no path leads out")
def labels(folder: Path, tally: Tally) -> None:
    """A stranger's database: a link in its place, and paths of images outside."""
    from mmalign.data.images import hash_image
    from mmalign.data.labels import LabelGroup, LabelImage, Labels
    from mmalign.types import ImageRef

    images = folder / "images"
    images.mkdir()
    for name in ("a", "b"):
        (images / f"{name}.png").write_bytes(png({"a": "red", "b": "blue"}[name]))
    write_lines(
        images / "metadata.jsonl",
        [{"file_name": f"{name}.png", "prompt": "red"} for name in ("a", "b")],
    )
    (images / "labels.sqlite").symlink_to(folder / "made.sqlite")
    said = mmalign("pairs", "label", str(images), "--port=0", seconds=10)
    made = (folder / "made.sqlite").exists()
    tally.point(said.refuses("is a link") and not made, f"{made}: {said.error}")
    (images / "labels.sqlite").unlink()
    secrets = []
    for name, color in (("../secret.png", "green"), ("../other.png", "black")):
        (images / name).write_bytes(png(color))
        key = hash_image(ImageRef(images / name, name)).hex()
        secrets.append(LabelImage(key, name))
    with closing(Labels(images / "labels.sqlite")) as known:
        (pair,) = known.add([LabelGroup("red", secrets)])
        known.judge("eve", pair, secrets[0].hash)
    with closing(Watched(folder / "secret.png")) as watched:
        said = mmalign("pairs", "label", str(images), f"--export={folder / 'out'}")
        ok = said.refuses("1 pairs without their images") and not watched.opened
        tally.point(ok, said.error)


@case(9, "names in a model's index of weights", f"{REFUSED}, in one line")
def names_in_models(folder: Path, tally: Tally) -> None:
    """Indexes of divided weights that name files outside, for both kinds of models."""
    from safetensors import safe_open

    secret = folder / "secret.safetensors"
    kinds = (
        (TOYS.sd, "unet/diffusion_pytorch_model.safetensors", "mapo"),
        (TOYS.sd, "text_encoder/model.safetensors", "mapo"),
        (TOYS.llava, "model.safetensors", "vlm-dpo"),
    )
    for number, (base, name, method) in enumerate(kinds):
        model = folder / str(number)
        shutil.copytree(base, model)
        weights = model / name
        shutil.copyfile(weights, secret)
        with safe_open(weights, framework="pt") as content:
            names = list(content.keys())
        weights.rename(weights.with_name("sound.safetensors"))  # or it is refused as empty
        outside = os.path.relpath(secret, weights.parent)
        for target in (outside, str(secret)):
            index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, target)}
            weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
            with closing(Watched(secret)) as watched:
                said = mmalign(*TOYS.train(method, folder / "run", f"--model={model}"))
                opened = watched.opened
                ok = said.refuses(str(model)) and not opened
                tally.point(ok, f"{name}: {'OPENED; ' if opened else ''}{said.error}")
