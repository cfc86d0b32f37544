"""People instead of a reward model: they compare the samples, and training waits for them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmalign.accelerator import StopSignal
from mmalign.data.files import write_bytes, writing
from mmalign.data.images import encode_png
from mmalign.data.labels import DATABASE, LabelGroup, LabelImage, Labels
from mmalign.data.schema import content_hash
from mmalign.data.votes import Tally
from mmalign.types import InputError, Modality

logger = logging.getLogger(__name__)
POLL_SECONDS = 0.5
TIE = 0.5


class PeopleReward:
    """The share of comparisons with the other samples of its prompt that people say a sample wins.

        r(x) = mean over the prompt's other samples y of 1, 1/2 or 0 for x better, a tie, y better

    where the majority of `votes` people decides. With the two candidates of D3PO's default this is
    the preference itself; a tie trains nothing. Answers are kept in the folder and found again by
    the content of the images: a resumed run that samples the same images asks nothing twice.
    """

    name = "people"
    modality: Modality = "image"
    differentiable = False
    range = (0.0, 1.0)
    scores_sets = True
    fingerprint = None  # an image's share depends on its rivals: never kept in a cache

    def __init__(self, folder: str = "people", votes: int = 1) -> None:
        """Prepare the folder, so that people can be there before the first samples are.

        Args:
            folder: receives the samples and the judgements; `mmalign pairs label FOLDER` shows it.
            votes: people who must judge each pair.

        Raises:
            InputError: if the folder cannot be written, or `votes` is not positive.
        """
        if votes < 1:
            raise InputError(f"reward people: votes must be at least 1, got {votes}")
        self.folder, self.votes = Path(folder).expanduser(), votes
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.labels = Labels(self.folder / DATABASE)

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        """Show the samples (B, 3, H, W) in [0, 1] to people and wait; returns (B,) in [0, 1].

        Raises:
            InputError: if the samples cannot be saved.
        """
        images = [self._save(sample) for sample in samples]
        groups: dict[str, dict[str, LabelImage]] = {}
        for prompt, image in zip(prompts, images, strict=True):
            groups.setdefault(prompt, {})[image.hash] = image
        keys = self.labels.add(LabelGroup(p, list(group.values())) for p, group in groups.items())
        wins = _wins(self._wait(keys))
        scores = [
            _mean(
                [wins[prompt, image.hash, other] for other in groups[prompt] if other != image.hash]
            )
            for prompt, image in zip(prompts, images, strict=True)
        ]
        return torch.tensor(scores)

    def _save(self, sample: Tensor) -> LabelImage:
        data = encode_png(sample, "sample")
        key = content_hash(data).hex()
        name = f"images/{key}.png"
        if not (self.folder / name).exists():
            write_bytes(self.folder / name, data)
        return LabelImage(key, name)

    def _wait(self, keys: Sequence[str]) -> list[Tally]:
        """Wait until every pair has its votes; a run that is told to end here loses no answer."""
        tallies = self.labels.tallies(keys, at_least=self.votes)
        if len(tallies) == len(keys):
            return tallies
        logger.info(
            "waiting for people to judge %d pairs: mmalign pairs label %s",
            len(keys) - len(tallies),
            self.folder,
        )
        stop = StopSignal()
        bar = tqdm(total=len(keys), desc="people", unit="pair", leave=False)
        with stop.installed(), bar:
            while len(tallies) < len(keys):
                if len(tallies) > bar.n:  # not at every look: that would fill a log
                    bar.update(len(tallies) - bar.n)
                if stop.requested:  # the trainer would only look after the step
                    raise SystemExit(stop.exit_code)
                time.sleep(POLL_SECONDS)
                tallies = self.labels.tallies(keys, at_least=self.votes)
        return tallies


def _wins(tallies: Sequence[Tally]) -> dict[tuple[str, str, str], float]:
    """Map prompt, image and other image to what the image gets out of the comparison."""
    wins = {}
    for tally in tallies:
        prompt, first, second = tally.pair[1:]
        value = TIE if tally.decision is None else float(tally.decision[0] == first)
        wins[prompt, first, second] = value
        wins[prompt, second, first] = 1 - value
    return wins


def _mean(values: Sequence[float]) -> float:
    """Average; a sample without others, or with equal ones only, ties."""
    return sum(values) / len(values) if values else TIE
