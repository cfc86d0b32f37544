"""Every score of every image compared, and the files that have them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm.auto import tqdm

from mmalign.data.files import write_bytes, write_jsonl
from mmalign.data.folders import METADATA
from mmalign.data.images import open_image, to_tensor
from mmalign.evaluation import prompt_diversity
from mmalign.pipelines._evaluation import Judges
from mmalign.pipelines._image_batches import image_batches, that_score_sets
from mmalign.pipelines._pictures import MAX_PIXELS
from mmalign.pipelines._subject_images import Row
from mmalign.rewards.combine import unique_names
from mmalign.scoring import BatchedReward, to_scores
from mmalign.types import ImageRef

if TYPE_CHECKING:
    from mmalign.pipelines._subjects import Subject

T = TypeVar("T")
BATCH = 32
"""Images of which the judge is asked at a time."""


class Named(NamedTuple):
    """A reward by its name in tables; a batch that memory made smaller stays so for all."""

    name: str
    reward: Any
    batched: BatchedReward


class Scorers(NamedTuple):
    """What scores images: the rewards that are reported, and the judge."""

    rewards: list[Named]
    judge: Named | None

    @property
    def every(self) -> list[Named]:
        """All of them, the judge last."""
        return self.rewards if self.judge is None else [*self.rewards, self.judge]


@dataclass(frozen=True)
class Scores:
    """What was measured on the images of one subject, one value per row.

    Attributes:
        columns: metric -> values; first the rewards, then the judge and what it adds.
        verdicts: what the judge says of each image; empty texts where it says nothing.
        correct: whether each image is right, None where the judge does not say.
        diversity: prompt -> mean distance of its images; empty with one image per prompt.
    """

    columns: dict[str, list[float]] = field(default_factory=dict)
    verdicts: list[str] = field(default_factory=list)
    correct: list[bool | None] = field(default_factory=list)
    diversity: Mapping[str, float] = field(default_factory=dict)


def make_scorers(judges: Judges) -> Scorers:
    """Name rewards and judge; no two share a name."""
    names = unique_names(judges.rewards)
    rewards = [
        Named(name, reward, BatchedReward(reward, max(config.batch_size, 1)))
        for name, (reward, config) in zip(names, judges.rewards, strict=True)
    ]
    judge = judges.judge
    if judge is None:
        return Scorers(rewards, None)
    return Scorers(
        rewards, Named(_free_name(judge.name, names), judge, BatchedReward(judge, BATCH))
    )


def score_subject(
    subject: Subject, rows: Sequence[Row], files: Sequence[Path], scorers: Scorers, device: str
) -> Scores:
    """Score the images of one subject and measure how different those of a prompt are.

    Raises:
        InputError: naming reward and image, for a score that is not a finite number.
    """
    every = {one.name: one.batched for one in scorers.every}
    parts = []
    with torch.no_grad(), tqdm(total=len(rows), desc=f"score {subject.name}", unit="image") as bar:
        for batch, images in image_batches(
            [row.prompt for row in rows],
            lambda row: _read(files[row]),
            max([BATCH, *(one.batch_size or BATCH for one in every.values())]),
            that_score_sets(every),
        ):
            prompts = [rows[row].prompt for row in batch]
            names = [f"{subject.name}/{files[row].name}" for row in batch]
            parts.append((batch, _score(scorers, images.to(device), prompts, names)))
            bar.update(len(batch))
    found = _joined(parts)
    return Scores(found.columns, found.verdicts, found.correct, _diversity(rows, files))


def write_scores(
    folder: Path,
    subjects: Sequence[Subject],
    rows: Sequence[Row],
    files: Sequence[Sequence[Path]],
    scores: Sequence[Scores],
) -> None:
    """Write `scores.csv` and `scores.json`, a row per image, and `samples/metadata.jsonl`.

    Raises:
        InputError: if the folder cannot be written.
    """
    table = [
        {
            "subject": subject.name,
            "file_name": file.relative_to(folder).as_posix(),
            **row._asdict(),
            **{name: values[number] for name, values in own.columns.items()},
        }
        for subject, paths, own in zip(subjects, files, scores, strict=True)
        for number, (row, file) in enumerate(zip(rows, paths, strict=True))
    ]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_bytes(folder / "scores.csv", text.getvalue().encode())
    lines = json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(folder / "scores.json", (lines + "\n").encode())
    samples = []
    for number, row in enumerate(rows):
        sample: dict[str, Any] = row._asdict()
        for subject, paths, own in zip(subjects, files, scores, strict=True):
            sample[f"{subject.slug}_file_name"] = f"{subject.slug}/{paths[number].name}"
            if own.verdicts:
                sample[f"{subject.slug}_verdict"] = own.verdicts[number]
        samples.append(sample)
    write_jsonl(folder / "samples" / METADATA, samples)


def _read(file: Path) -> Tensor:
    return to_tensor(open_image(ImageRef(file, str(file)), max_pixels=MAX_PIXELS))


def _score(scorers: Scorers, images: Tensor, prompts: list[str], names: list[str]) -> Scores:
    scores = Scores()
    for one in scorers.every:
        scores.columns[one.name] = one.batched(images, prompts, names).tolist()
    if scorers.judge is not None:
        _judge(scorers.judge.reward, images, prompts, scores)
    return scores


def _judge(judge: Any, images: Tensor, prompts: list[str], scores: Scores) -> None:
    """Ask a judge for the metrics and words that it may have; see `evaluate_models`."""
    count, taken = len(prompts), list(scores.columns)
    right: list[bool | None] = [None] * count
    for name, values in (
        judge.metrics(images, prompts) if hasattr(judge, "metrics") else {}
    ).items():
        numbers = to_scores(values, count).tolist()
        scores.columns[_free_name(name, taken)] = numbers
        if name == "correct":
            right = [number > 0.5 for number in numbers]
    scores.correct.extend(right)
    says = hasattr(judge, "verdicts")
    scores.verdicts.extend(judge.verdicts(images, prompts) if says else [""] * count)


def _joined(parts: Sequence[tuple[Sequence[int], Scores]]) -> Scores:
    """Put what batches of images were scored into the order of the images."""
    order = [row for batch, _ in parts for row in batch]

    def joined(values: Iterable[Iterable[T]]) -> list[T]:
        by_row = dict(zip(order, chain.from_iterable(values), strict=True))
        return [by_row[row] for row in sorted(by_row)]

    scored = [scores for _, scores in parts]
    judged = any(scores.verdicts for scores in scored)
    return Scores(
        {name: joined(one.columns[name] for one in scored) for name in scored[0].columns},
        joined(one.verdicts for one in scored) if judged else [],
        joined(one.correct for one in scored) if judged else [],
    )


def _free_name(name: str, taken: Sequence[str]) -> str:
    free, count = name, 1
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    return free


def _diversity(rows: Sequence[Row], files: Sequence[Path]) -> dict[str, float]:
    """Measure `prompt_diversity`; images of a prompt take the size of its first one."""
    members: dict[str, list[Path]] = {}
    for row, file in zip(rows, files, strict=True):
        members.setdefault(row.prompt, []).append(file)
    found: dict[str, float] = {}
    for prompt, own in members.items():
        if len(own) > 1:
            images = [_read(file) for file in own]
            size = images[0].shape[1:]
            fitted = [i if i.shape[1:] == size else _fit(i, size) for i in images]
            found |= prompt_diversity(torch.stack(fitted), [prompt] * len(own))
    return found


def _fit(image: Tensor, size: torch.Size) -> Tensor:
    return interpolate(image[None], list(size), mode="bilinear", antialias=True)[0]
