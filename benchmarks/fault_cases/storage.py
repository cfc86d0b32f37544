"""Row 4: disks that are full, folders that cannot be written. Needs the right to mount."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from .harness import Tally, case, mmalign
from .toys import TOYS, difference

EXPECTS = "one line with the path; the checkpoint before is intact; resumed bitwise with space"


@contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[None]:
    """Mount a disk of that size."""
    place.mkdir()
    mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place))
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def mount(*arguments: str) -> None:
    """Call mount."""
    subprocess.run(["mount", *arguments], check=True)


def fill(place: Path, leave: int) -> None:
    """Fill a disk up to `leave` bytes."""
    free = shutil.disk_usage(place).free - leave
    with (place / "filling").open("wb") as file:
        file.write(b"\0" * max(0, free))


def _valid(output: Path) -> bool:
    from mmalign.checkpoint import latest_checkpoint, list_checkpoints

    folder = output / "checkpoints"
    return latest_checkpoint(folder) == list_checkpoints(folder)[-1]


@case(4, "disk full in a checkpoint", EXPECTS)
def full_in_checkpoint(folder: Path, tally: Tally) -> None:
    """Leave too little space for the second checkpoint, then room again."""
    disk, whole = folder / "disk", folder / "whole"
    mmalign(*TOYS.train("diffusion-dpo", whole))
    with small_disk(disk, 4096):
        output = disk / "run"
        argv = TOYS.train("diffusion-dpo", output)
        assert mmalign(*argv, "--max_steps=4").code == 0
        fill(disk, 20_000)
        said = mmalign(*argv)
        tally.refused(said, "No space left on device", str(disk), "earlier checkpoints are intact")
        tally.point(_valid(output), "the last checkpoint is damaged")
        left = [p.name for p in (output / "checkpoints").glob(".*")]
        tally.point(not left, f"leaves {left}")
        (disk / "filling").unlink()
        again = mmalign(*argv)
        problem = again.error if again.code else difference(whole, output)
        tally.point(not problem, problem)


def fill_at_step(disk: Path, step: int) -> None:
    """Fill the disk, in this process, before a step is logged."""
    from mmalign.metrics_log import MetricsLog

    original = MetricsLog.write

    def write(self: MetricsLog, number: int, values: Mapping[str, float]) -> None:
        if number == step:
            fill(disk, 0)
        original(self, number, values)

    MetricsLog.write = write  # type: ignore[method-assign]


@case(4, "disk full in the log", EXPECTS)
def full_in_log(folder: Path, tally: Tally) -> None:
    """Leave no space at all from a line of the log on, until its page of the disk is full."""
    disk, whole = folder / "disk", folder / "whole"
    more = ("--max_steps=60", "--save_steps=4")
    mmalign(*TOYS.train("mapo", whole, *more))
    with small_disk(disk, 4096):
        output = disk / "run"
        argv = TOYS.train("mapo", output, *more, "--save_steps=1000")
        said = mmalign(*TOYS.train("mapo", output, *more, "--max_steps=4"))
        assert said.code == 0, said.error
        said = mmalign(*argv, before=partial(fill_at_step, disk, 6))
        tally.refused(said, "metrics.jsonl: cannot write metrics", "No space left on device")
        tally.point(_valid(output), "the last checkpoint is damaged")
        (disk / "filling").unlink()
        again = mmalign(*argv)
        problem = again.error if again.code else difference(whole, output)
        tally.point(not problem, problem)


@case(4, "disk full in the cache of latents", "one line with the path; no partial cache is used")
def full_in_cache(folder: Path, tally: Tally) -> None:
    """Leave no space for the cache, then room."""
    disk, output = folder / "disk", folder / "run"
    with small_disk(disk, 256):
        argv = TOYS.train("mapo", output, f"--pairs.cache_dir={disk / 'cache'}")
        fill(disk, 8192)
        tally.refused(mmalign(*argv), "No space left on device", str(disk))
        (disk / "filling").unlink()
        again = mmalign(*argv)
        tally.point(again.code == 0, again.error)


@case(4, "disk full in candidates of pairs", "one line with the path; continues with space")
def full_in_candidates(folder: Path, tally: Tally) -> None:
    """Leave no space while candidates are sampled, then room."""
    disk = folder / "disk"
    with small_disk(disk, 512):
        argv = [
            *("pairs", "build", f"--model={TOYS.sd}", f"--prompts={TOYS.prompts}", "--device=cpu"),
            *(f"--output={disk / 'pairs'}", "--sampling.num_inference_steps=2"),
            *("--candidates_per_prompt=3", '--rewards=[{"name": "brightness"}]'),
        ]
        fill(disk, 12_000)
        tally.refused(mmalign(*argv), "No space left on device", str(disk))
        (disk / "filling").unlink()
        again = mmalign(*argv)
        tally.point(again.code == 0, again.error)


@case(4, "read-only folder of a run", "one line with the path, before the model is loaded")
def read_only(folder: Path, tally: Tally) -> None:
    """Point a run at a disk that is mounted read-only."""
    disk = folder / "disk"
    with small_disk(disk, 256):
        mount("-o", "remount,ro", str(disk))
        for argv in (
            TOYS.train("mapo", disk / "run"),
            TOYS.train("d3po", disk / "run"),
            TOYS.train("vlm-dpo", disk / "run"),
            TOYS.train("online-dpo", disk / "run"),
            ["generate", f"--model={TOYS.sd}", "--prompt=red", f"--output={disk / 'out'}"],
        ):
            said = mmalign(*argv)
            tally.refused(said, "Read-only file system", str(disk))
            tally.point("loading" not in said.text, "a model is loaded first")


@case(4, "folder that becomes read-only before a run goes on", EXPECTS)
def read_only_later(folder: Path, tally: Tally) -> None:
    """Make the disk read-only after some steps; the command that follows says so."""
    disk, whole = folder / "disk", folder / "whole"
    mmalign(*TOYS.train("mapo", whole))
    with small_disk(disk, 4096):
        output = disk / "run"
        argv = TOYS.train("mapo", output)
        mmalign(*argv, "--max_steps=4")
        mount("-o", "remount,ro", str(disk))
        tally.refused(mmalign(*argv), "Read-only file system", str(disk))
        mount("-o", "remount,rw", str(disk))
        again = mmalign(*argv)
        problem = again.error if again.code else difference(whole, output)
        tally.point(not problem, problem)


@case(4, "cache that cannot be written", "one line with the path")
def read_only_cache(folder: Path, tally: Tally) -> None:
    """Point the caches at a read-only disk and at a file."""
    disk = folder / "disk"
    (folder / "file").write_text("in the way")
    with small_disk(disk, 256):
        mount("-o", "remount,ro", str(disk))
        for method, option in (("mapo", "--pairs.cache_dir"), ("vlm-dpo", "--cache_dir")):
            for place in (disk / "cache", folder / "file" / "cache"):
                said = mmalign(*TOYS.train(method, folder / method, f"{option}={place}"))
                tally.refused(said, str(place.parent))
