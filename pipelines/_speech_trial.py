"""What a captioner says about scenes of Shapes world, before and after, and how true it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tqdm.auto import tqdm

from mmalign.config import GenerationConfig
from mmalign.evaluation import WinRate, win_rate
from mmalign.report import AnswerComparison
from mmalign.shapes.companions import probe_set, scene_set
from mmalign.shapes.hallucination import (
    Interval,
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


@dataclass(frozen=True, kw_only=True)
class SpeechResult:
    """Metric means before and after, paired changes, win rate by caption, and examples."""

    before: dict[str, float]
    after: dict[str, float]
    changes: dict[str, Interval]
    win_rate: WinRate
    answers: list[AnswerComparison]


class SpeechTrial:
    """Held-out scenes, each to be described, with four yes/no questions about each."""

    def __init__(self, count: int, seed: int, generation: GenerationConfig) -> None:
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

    def compare(self, before: Spoken, after: Spoken, shown: int) -> SpeechResult:
        """Measure both, and show the first scenes that they describe differently."""
        truths = [probe.truth for probe in self.probes]
        sides = [
            caption_metrics(self.scenes, side.captions, seed=self._seed)
            | question_metrics(truths, side.answers, seed=self._seed)
            for side in (before, after)
        ]
        changes = caption_changes(self.scenes, before.captions, after.captions, seed=self._seed)
        changes |= question_changes(truths, before.answers, after.answers, seed=self._seed)
        return SpeechResult(
            before={name: interval.value for name, interval in sides[0].items()},
            after={name: interval.value for name, interval in sides[1].items()},
            changes=changes,
            win_rate=win_rate(
                caption_scores(self.scenes, after.captions),
                caption_scores(self.scenes, before.captions),
                [str(index) for index in range(len(self.scenes))],
                seed=self._seed,
            ),
            answers=self._examples(before.captions, after.captions, shown),
        )

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
