"""What training changed: log-probs on held-out pairs, answers, and how a task is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from PIL import Image
from tqdm.auto import tqdm

from mmalign.adapters._answers import question_batches
from mmalign.adapters._vlm import VlmFamily
from mmalign.config import GenerationConfig, VlmDpoConfig
from mmalign.data.vlm_readers import read_vlm_pairs
from mmalign.intervals import mean_ci
from mmalign.pipelines._vlm_pairs import EncodedPairs
from mmalign.pipelines._vlm_trial import AnswerTrial
from mmalign.processes import gather, gather_shared, is_main, share
from mmalign.report import AnswerComparison, WinRateSummary
from mmalign.sharding import requested
from mmalign.types import Branches, Question

BAR_DELAY = 1.0


class Side(NamedTuple):
    """One model on the held-out pairs: values (N,) per metric, and answers."""

    values: dict[str, list[float]]
    answers: list[str]


class Measured(NamedTuple):
    """One model: on the held-out pairs, and whatever a trial keeps of it."""

    pairs: Side | None
    trial: Any


@dataclass(frozen=True, kw_only=True)
class VlmEvaluation:
    """Base against trained model; empty without held-out pairs and trial."""

    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    changes: dict[str, tuple[float, float]] = field(default_factory=dict)
    answers: list[AnswerComparison] = field(default_factory=list)
    win_rate: WinRateSummary | None = None


class Evaluator:
    """Everything that a training run measures before and after."""

    def __init__(self, adapter: VlmFamily, config: VlmDpoConfig, trial: AnswerTrial | None) -> None:
        """Read what it needs.

        Raises:
            InputError: held-out pairs cannot be used.
        """
        self._adapter, self._trial, self._shown = adapter, trial, config.num_answers
        self._held_out = None if config.eval_pairs is None else HeldOut(adapter, config)

    def measure(self, description: str) -> Measured:
        """Measure the model as it is."""
        pairs = None if self._held_out is None else self._held_out.measure(description)
        trial = None if self._trial is None else self._trial.listen(self._adapter)
        return Measured(pairs, trial)

    def compare(self, before: Measured, after: Measured) -> VlmEvaluation:
        """Put together what changed."""
        found = VlmEvaluation()
        if self._held_out is not None and before.pairs is not None and after.pairs is not None:
            found = self._held_out.compare(before.pairs, after.pairs)
        if self._trial is None:
            return found
        trial = self._trial.compare(before.trial, after.trial, self._shown)
        return VlmEvaluation(
            before={**trial.before, **found.before},
            after={**trial.after, **found.after},
            changes={**trial.changes, **found.changes},
            answers=[*trial.answers, *found.answers],
            win_rate=WinRateSummary(judge=trial.judge, **trial.win_rate._asdict()),
        )


class HeldOut:
    """Pairs that no training sees."""

    def __init__(self, adapter: VlmFamily, config: VlmDpoConfig) -> None:
        """Read and encode them.

        Raises:
            InputError: they cannot be read, or none can be used.
        """
        assert config.eval_pairs is not None
        self._adapter, self._config = adapter, config
        table = read_vlm_pairs(config.eval_pairs)
        self._pairs = EncodedPairs(
            table.pairs,
            adapter,
            max_length=config.max_length,
            on_bad_row=config.eval_pairs.on_bad_row,
        )
        asked = [self._pairs.pair(i) for i in range(min(config.num_answers, len(self._pairs)))]
        self.questions = [Question(pair.prompt, pair.images) for pair in asked]
        self.groups = [self._pairs[i].pair_id for i in range(len(self._pairs))]

    @torch.no_grad()
    def measure(self, description: str) -> Side:
        """Score the pairs and answer some questions with the model as it is.

        Several processes, all of which have to call it, share both; where weights are divided, all
        do everything, because they have to run as many forwards.
        """
        names = ("chosen_logp", "rejected_logp", "logp_accuracy", "logp_margin")
        everything = range(len(self._pairs))
        mine = everything if requested() else share(everything)
        bar = tqdm(mine, description, unit="pair", delay=BAR_DELAY, disable=not is_main())
        rows = [self._score(index) for index in bar]
        rows = rows if requested() else gather_shared(rows)
        columns = map(list, zip(*rows, strict=True))
        return Side(dict(zip(names, columns, strict=True)), self._answered())

    def _score(self, index: int) -> tuple[float, float, float, float]:
        """Measure one pair."""
        pair = self._pairs[index]
        features = None
        if pair.images is not None:
            features = self._adapter.encode_images(self._pairs.images(index))
        branches = Branches(pair.prefix_ids, (pair.chosen_ids, pair.rejected_ids), features)
        (sides,) = self._adapter.token_logps([branches])
        chosen, rejected = (float(logps.mean()) for logps in sides)
        gap = chosen - rejected
        return chosen, rejected, 0.5 + 0.5 * ((gap > 0) - (gap < 0)), gap

    def _answered(self) -> list[str]:
        """Answer the questions, whole batches at a time, so that sharing changes no answer."""
        config: GenerationConfig = self._config.generation
        # Draws at a temperature are keyed by the questions before, in this list.
        if config.temperature > 0 or requested():
            return self._adapter.generate(self.questions, config)
        places = share(list(question_batches(self.questions, config.batch_size)))
        answers = [self._adapter.generate([self.questions[i] for i in p], config) for p in places]
        found: dict[int, str] = {}
        for part in gather([*zip(places, answers, strict=True)]):
            for batch, texts in part:
                found |= zip(batch, texts, strict=True)
        return [found[i] for i in range(len(self.questions))]

    def compare(self, before: Side, after: Side) -> VlmEvaluation:
        """Compare two models on the same pairs."""
        means = [
            {name: sum(v) / len(v) for name, v in side.values.items()} for side in (before, after)
        ]
        changes = {
            name: mean_ci(
                [b - a for a, b in zip(values, after.values[name], strict=True)],
                self.groups,
                seed=self._config.seed,
            ).ci95
            for name, values in before.values.items()
        }
        return VlmEvaluation(
            before=means[0],
            after=means[1],
            changes=changes,
            answers=self._answers(before.answers, after.answers),
        )

    def _answers(self, before: Sequence[str], after: Sequence[str]) -> list[AnswerComparison]:
        rows = []
        for index, (question, *answers) in enumerate(
            zip(self.questions, before, after, strict=True)
        ):
            pictures: list[Image.Image] = self._adapter.pictures(self._pairs.pair(index))
            rows.append(
                AnswerComparison(
                    prompt=question.prompt,
                    images=pictures[:1],
                    before=[(answers[0], False)],
                    after=[(answers[1], False)],
                )
            )
        return rows
