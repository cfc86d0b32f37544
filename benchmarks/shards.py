"""How fast `mmalign score` and `mmalign pairs build` go through webdataset shards, in what memory.

    python benchmarks/shards.py --rows 10000 100000 1000000 --folder runs/shards

Makes synthetic shards of 10,000 pictures of 8 x 8 pixels, ten candidates to a prompt, so that what
is measured is the way of a row through mmalign rather than a reward; runs each command in a process
of its own and prints rows per second and peak resident memory. With `--seconds` a command is ended
by SIGTERM after that time, and goes on in the next run.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from threading import Timer

import numpy as np
from PIL import Image

ROWS_PER_SHARD = 10_000
PICTURES = 997
CANDIDATES = 10


def main() -> None:
    """Make the shards that are missing, run both commands for every number of rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, default=Path("shards"))
    parser.add_argument("--jobs", nargs="+", default=["score", "pairs"])
    parser.add_argument("--seconds", type=float, default=None)
    options = parser.parse_args()
    make_shards(options.folder / "in", max(options.rows) // ROWS_PER_SHARD)
    for rows in options.rows:
        for job in options.jobs:
            print(json.dumps(measure(job, rows, options)), flush=True)


def make_shards(folder: Path, count: int) -> None:
    """Write the shards that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    pictures = []
    for _ in range(PICTURES):
        buffer = io.BytesIO()
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    for shard in range(count):
        file = folder / f"{shard:06d}.tar"
        if file.exists():
            continue
        temporary = file.with_suffix(".part")
        with tarfile.open(temporary, "w") as archive:
            for number in range(ROWS_PER_SHARD):
                row = shard * ROWS_PER_SHARD + number
                text = f"prompt {row // CANDIDATES}".encode()
                for suffix, data in (("png", pictures[row % PICTURES]), ("txt", text)):
                    info = tarfile.TarInfo(f"{row:09d}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        os.replace(temporary, file)


def measure(job: str, rows: int, options: argparse.Namespace) -> dict[str, object]:
    """Run a command over the first rows; `rows` is what this run did of them."""
    folder = options.folder
    shards = f"{folder}/in/{{000000..{rows // ROWS_PER_SHARD - 1:06d}}}.tar"
    output = folder / f"{job}-{rows}"
    before = finished(output)
    command = [sys.executable, "-m", "mmalign"]
    if job == "score":
        command += ["score", "--reward=[brightness]", "--batch_size=256"]
    else:
        command += ["pairs", "build", '--rewards=[{"name": "brightness", "batch_size": 256}]']
    command += [f"--images={shards}", f"--output={output}"]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if options.seconds is not None:
        timer = Timer(options.seconds, process.terminate)
        timer.daemon = True
        timer.start()
    _, status, usage = os.wait4(process.pid, 0)
    done = finished(output) - before
    seconds = time.monotonic() - started
    cpu = usage.ru_utime + usage.ru_stime
    return {
        "job": job,
        "of": rows,
        "rows": done,
        "exit": os.waitstatus_to_exitcode(status),
        "seconds": round(seconds, 1),
        "rows_per_cpu_second": round(done / cpu),
        "peak_rss_mib": round(usage.ru_maxrss / 1024),
    }


def finished(output: Path) -> int:
    """Count the rows of finished shards."""
    return len(list((output / "records").glob("*.json"))) * ROWS_PER_SHARD


if __name__ == "__main__":
    main()
