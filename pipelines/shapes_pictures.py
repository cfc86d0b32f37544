"""`mmalign shapes pictures`: pictures of Shapes world with a question about each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from mmalign.data.files import write_jsonl
from mmalign.data.images import save_png
from mmalign.shapes.companions import scene_set
from mmalign.shapes.render import render
from mmalign.shapes.speech import DESCRIBE

if TYPE_CHECKING:
    from mmalign.config import ShapesPicturesConfig


def run(config: ShapesPicturesConfig) -> None:
    """Draw pictures, and ask for a description of each.

    Writes `questions.jsonl` and `images/`, as `mmalign pairs topics` reads them.

    Raises:
        InputError: the folder cannot be written.
    """
    folder = Path(config.output)
    rows = []
    for number, scene in enumerate(scene_set(config.scenes, config.count, config.seed)):
        name = f"images/{number:04d}.png"
        save_png(render(scene), folder / name)
        rows.append({"id": f"{number:04d}", "image": name, "prompt": DESCRIBE[0]})
    write_jsonl(folder / "questions.jsonl", rows)
    tqdm.write(f"{len(rows)} pictures in {folder}; questions in {folder / 'questions.jsonl'}")
