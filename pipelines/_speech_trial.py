"""What a captioner says about scenes of Shapes world, before and after, and how true it is."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from tqdm.auto import tqdm

from mmalign.config import GenerationConfig
from mmalign.intervals import mean_ci, win_rate
from mmalign.pipelines._vlm_trial import TrialResult
from mmalign.report import AnswerComparison
from mmalign.shapes.companions import probe_set, scene_set
from mmalign.shapes.hallucination import (
    caption_changes,
    caption_metrics,
    caption_scores,
    mark_caption,
    question_changes,
    question_metrics,
)
from mmalign.shapes.questions import NO, YES
from mmalign.shapes.render import render
from mmalign.shapes.speech import DESCRIBE
from mmalign.types import Question, VlmAdapter

JUDGE = "shapes_objects_f1"


class Spoken(NamedTuple):
    """Captions, one per scene, and answers, one per yes/no question."""

    captions: list[str]
    answers: list[str]


class SpeechTrial:
    """Held-out scenes, each to be described, with four yes/no questions about each."""

    def __init__(self, *, seed: int, generation: GenerationConfig, count: int = 200) -> None:
        """Draw `count` scenes."""
        self._seed, self._generation = seed, generation
        self.scenes = scene_set("held_out", count, seed)
        self.probes = probe_set(self.scenes, seed)
        self.pictures = [render(scene) for scene in self.scenes]

    def listen(self, adapter: VlmAdapter) -> Spoken:
        """Let a model speak."""
        asked = [Question(DESCRIBE[0], (picture,)) for picture in self.pictures]
        captions = adapter.generate(asked, self._generation)
        size = self._generation.batch_size
        probed = [Question(p.prompt, (self.pictures[p.scene_index],)) for p in self.probes]
        answers = [YES if yes > no else NO for yes, no in adapter.yes_no(probed, size)]
        tqdm.write(f"described {len(captions)} held-out scenes, answered {len(answers)} questions")
        return Spoken(captions, answers)

    def compare(self, before: Spoken, after: Spoken, shown: int) -> TrialResult:
        """Measure both, and show the first scenes."""
        truths = [probe.truth for probe in self.probes]
        changes = caption_changes(self.scenes, before.captions, after.captions, seed=self._seed)
        changes |= question_changes(truths, before.answers, after.answers, seed=self._seed)
        scores = [caption_scores(self.scenes, side.captions) for side in (before, after)]
        groups = [str(index) for index in range(len(self.scenes))]
        gains = [b - a for a, b in zip(*scores, strict=True)]
        return TrialResult(
            before=self._metrics(before, scores[0]),
            after=self._metrics(after, scores[1]),
            changes={name: change.ci95 for name, change in changes.items()}
            | {JUDGE: mean_ci(gains, groups, seed=self._seed).ci95},
            win_rate=win_rate(scores[1], scores[0], groups, seed=self._seed),
            judge=JUDGE,
            answers=self._examples(before.captions, after.captions, shown),
        )

    def _metrics(self, side: Spoken, scores: Sequence[float]) -> dict[str, float]:
        truths = [probe.truth for probe in self.probes]
        intervals = caption_metrics(self.scenes, side.captions, seed=self._seed)
        intervals |= question_metrics(truths, side.answers, seed=self._seed)
        values = {name: interval.value for name, interval in intervals.items()}
        return values | {JUDGE: fmean(scores)}

    def _examples(
        self, before: Sequence[str], after: Sequence[str], shown: int
    ) -> list[AnswerComparison]:
        return [
            AnswerComparison(
                prompt=DESCRIBE[0],
                images=[self.pictures[index]],
                before=self._marked(index, before[index]),
                after=self._marked(index, after[index]),
            )
            for index in range(min(shown, len(self.scenes)))
        ]

    def _marked(self, index: int, caption: str) -> list[tuple[str, bool]]:
        pieces = mark_caption(self.scenes[index], caption)
        return [(text, there is False) for text, there in pieces]
