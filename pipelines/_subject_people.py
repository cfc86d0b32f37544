"""People as judges of a comparison: two pictures of a prompt at a time, and no names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from mmalign.data.images import hash_image
from mmalign.data.labels import DATABASE, LabelGroup, LabelImage, Labels, make_pair
from mmalign.data.votes import Agreement, Tally, agreement
from mmalign.intervals import mean_ci
from mmalign.pipelines._label_server import check_page, serve
from mmalign.pipelines._pictures import MAX_PIXELS
from mmalign.pipelines._subject_images import Row
from mmalign.pipelines._subject_stats import Differences, People
from mmalign.randomness import keyed_generator
from mmalign.types import ImageRef, InputError

if TYPE_CHECKING:
    from mmalign.config import BlindConfig

RESAMPLES = 1000


class Question(NamedTuple):
    """Two subjects' pictures of one row; `key` is None where they are the same picture."""

    row: int
    one: int
    other: int
    image: str
    key: str | None


class Panel:
    """The pictures that people compare, and what they said.

    Sides are drawn by person and pair, and the page knows pictures by their content, so neither it
    nor the database says which subject made which.
    """

    def __init__(
        self, folder: Path, rows: Sequence[Row], files: Sequence[Sequence[Path]], shown: int
    ) -> None:
        """Prepare the questions.

        Args:
            folder: holds the pictures, and the answers in `labels.sqlite`.
            rows: what every subject has an image of.
            files: of each subject, one per row.
            shown: images of each prompt that are shown.
        """
        self.folder, self.rows = folder, rows
        self.hashes = [[_hash(file) for file in own] for own in files]
        self.paths = [[file.relative_to(folder).as_posix() for file in own] for own in files]
        self.shown = [number for number, row in enumerate(rows) if row.number < shown]

    @property
    def database(self) -> Path:
        """The file of the answers."""
        return self.folder / DATABASE

    def ask(self, config: BlindConfig) -> None:
        """Serve the page until it is interrupted or every pair has its answers.

        Raises:
            InputError: if the address or the database cannot be used, or all pictures are the same.
        """
        check_page(config)
        keys = {question.key for question in self.questions() if question.key is not None}
        if not keys:
            raise InputError("there is nothing to label: all subjects made the same pictures")
        with closing(Labels(self.database)) as labels:
            labels.unlist()
            labels.add(self._groups())

            def complete() -> bool:
                done = labels.tallies(list(keys), at_least=config.people)
                return len(done) == len(keys)

            if not complete():
                serve(labels, self.folder, config, max_pixels=MAX_PIXELS, complete=complete)

    def answers(self, seed: int) -> tuple[Differences, People] | None:
        """Read what people said about these pictures; None where nobody has answered.

        The majority of each pair decides it, and without one it is a tie.
        """
        if not self.database.exists():
            return None
        questions = list(self.questions())
        keys = {question.key for question in questions if question.key is not None}
        with closing(Labels(self.database)) as labels:
            tallies = labels.tallies(list(keys))
            names = labels.people(list(keys))
        if not tallies:
            return None
        people = People(
            names=names,
            answers=sum(tally.votes for tally in tallies),
            asked=len(keys),
            judged=len(tallies),
            same=sum(question.key is None for question in questions),
            agreement=agreement(tallies),
            share_ci95=_share_interval(tallies, seed),
            kappa_ci95=_kappa_interval(tallies, seed),
        )
        return self._differences(questions, {tally.pair.key: tally for tally in tallies}), people

    def questions(self) -> Iterator[Question]:
        """List every two subjects' pictures of the rows that are shown."""
        for row in self.shown:
            for one, other in combinations(range(len(self.hashes)), 2):
                first, second = self.hashes[one][row], self.hashes[other][row]
                same = first == second
                key = None if same else make_pair(self.rows[row].prompt, first, second).key
                yield Question(row, one, other, first, key)

    def _groups(self) -> Iterator[LabelGroup]:
        for row in self.shown:
            images = {
                own[row]: LabelImage(own[row], paths[row])
                for own, paths in zip(self.hashes, self.paths, strict=True)
            }
            yield LabelGroup(self.rows[row].prompt, list(images.values()))

    def _differences(self, questions: Sequence[Question], tallies: dict[str, Tally]) -> Differences:
        def differences(one: int, other: int) -> tuple[list[float], list[str]]:
            gains: list[float] = []
            prompts: list[str] = []
            for question in questions:
                tally = tallies.get(question.key or "")
                if tally is None or {question.one, question.other} != {one, other}:
                    continue
                gain = _gain(tally, question.image)
                gains.append(gain if question.one == one else -gain)
                prompts.append(self.rows[question.row].prompt)
            return gains, prompts

        return differences


def _gain(tally: Tally, image: str) -> float:
    if tally.decision is None:
        return 0.0
    return 1.0 if tally.decision[0] == image else -1.0


def _hash(file: Path) -> str:
    return hash_image(ImageRef(file, str(file))).hex()


def _shared(tallies: Sequence[Tally]) -> list[Tally]:
    return [tally for tally in tallies if tally.votes >= 2]


def _share_interval(tallies: Sequence[Tally], seed: int) -> tuple[float, float] | None:
    shared = _shared(tallies)
    if not shared:
        return None
    unanimous = [float(tally.votes in tally[1:]) for tally in shared]
    return mean_ci(unanimous, [tally.pair.prompt for tally in shared], seed=seed).ci95


def _kappa_interval(tallies: Sequence[Tally], seed: int) -> tuple[float, float] | None:
    """Resample prompts; resamples in which everything is a tie have no kappa."""
    by_prompt: dict[str, list[Tally]] = {}
    for tally in _shared(tallies):
        by_prompt.setdefault(tally.pair.prompt, []).append(tally)
    if not by_prompt:
        return None
    clusters = list(by_prompt.values())
    generator = keyed_generator(seed, "kappa")
    draws = torch.randint(len(clusters), (RESAMPLES, len(clusters)), generator=generator)
    found = []
    for draw in draws.tolist():
        drawn: Agreement = agreement([tally for number in draw for tally in clusters[number]])
        if drawn.kappa is not None:
            found.append(drawn.kappa)
    if not found:
        return None
    values = torch.tensor(found, dtype=torch.float64)
    bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = values.quantile(bounds).tolist()
    return float(low), float(high)
