"""Trials: base and trained model do the same task, and something that knows the truth compares."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mmalign.config import EVALUATION_SEED
from mmalign.rewards import import_dotted
from mmalign.types import InputError

if TYPE_CHECKING:
    from mmalign.config import VlmDpoConfig
    from mmalign.intervals import WinRate
    from mmalign.report import AnswerComparison
    from mmalign.types import VlmAdapter

TRIALS = {"shapes": "mmalign.pipelines._speech_trial:SpeechTrial"}


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """What a trial found.

    Attributes:
        before: metric -> mean of the base.
        after: metric -> mean of the trained model.
        changes: metric -> 95 % interval of after - before.
        win_rate: of the trained model.
        judge: name of the metric that decides who wins.
        answers: examples.
    """

    before: Mapping[str, float]
    after: Mapping[str, float]
    changes: Mapping[str, tuple[float, float]]
    win_rate: WinRate
    judge: str
    answers: Sequence[AnswerComparison]


class AnswerTrial(Protocol):
    """A task for a vision-language model.

    Made as `Trial(seed=..., generation=..., **options)`, where `generation` says how answers are
    generated.
    """

    def listen(self, adapter: VlmAdapter) -> Any:
        """Let a model do the task; returns whatever `compare` needs."""
        ...

    def compare(self, before: Any, after: Any, shown: int) -> TrialResult:
        """Compare what two models did, with at most `shown` examples."""
        ...


def load_trial(config: VlmDpoConfig) -> AnswerTrial | None:
    """Make the trial that a training run names; None where it names none.

    Raises:
        InputError: there is no such trial, or it does not take the options.
    """
    if config.trial is None:
        return None
    name = config.trial.name
    if name not in TRIALS and ":" not in name:
        near = difflib.get_close_matches(name, TRIALS, n=1, cutoff=0.0)[0]
        raise InputError(f"trial.name: {name!r} is unknown: did you mean {near!r}? or module:Class")
    target: Any = import_dotted(TRIALS.get(name, name))
    given = {"seed": config.seed + EVALUATION_SEED, "generation": config.generation}
    options = given | config.trial.options
    try:
        inspect.signature(target).bind(**options)
    except (TypeError, ValueError) as error:
        raise InputError(f"trial.options: {name}: {error}") from error
    trial: AnswerTrial = target(**options)
    return trial
