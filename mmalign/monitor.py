"""Warnings about training that goes wrong in ways a falling loss hides."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from statistics import fmean
from typing import Any

logger = logging.getLogger(__name__)

WINDOW = 20
"""Consecutive steps a symptom has to last."""
SATURATED_MARGIN = 20.0
"""Implicit-reward margin in nats; the gradient of logsigmoid at 20 is 2e-9."""
DISPLACEMENT = 0.05
"""Relative rise of both denoising errors over the reference."""


class Monitor:
    """Watches the metrics of preference training and counts skipped steps; warns once per symptom.

    Saturation: `rewards/margin` (beta times margin) beyond `SATURATED_MARGIN` for `WINDOW` steps;
    the sigmoid has no gradient left, or beta is in the wrong unit. Displacement: over `WINDOW`
    steps the mean denoising error is above the reference's for chosen and rejected alike; the
    margin grows because rejected images get worse faster, not because chosen ones get better.
    """

    def __init__(self) -> None:
        """Start with an empty history."""
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.idle_steps = 0
        self.idle_in_a_row = 0
        self.idle_reason = ""
        self._given: dict[str, str] = {}
        self._margins: deque[float] = deque(maxlen=WINDOW)
        self._rises: dict[str, deque[float]] = {
            side: deque(maxlen=WINDOW) for side in ("chosen", "rejected")
        }

    @property
    def warnings(self) -> list[str]:
        """Every warning given so far."""
        return list(self._given.values())

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in one step's metrics; metrics that a method does not have are not watched."""
        self.skipped_in_a_row = self.idle_in_a_row = 0
        if "rewards/margin" in metrics:
            self._margins.append(abs(metrics["rewards/margin"]))
        for side, rises in self._rises.items():
            policy = metrics.get(f"denoising_error/policy_{side}")
            reference = metrics.get(f"denoising_error/ref_{side}")
            if policy is not None and reference:
                rises.append(policy / reference - 1)
        if len(self._margins) == WINDOW and min(self._margins) > SATURATED_MARGIN:
            self._warn(
                "saturation",
                f"beta x margin has saturated: |rewards/margin| was over {SATURATED_MARGIN:g} in"
                f" the {WINDOW} steps up to step {step}; lower beta or learning_rate, or stop",
            )
        if all(len(r) == WINDOW and fmean(r) > DISPLACEMENT for r in self._rises.values()):
            self._warn(
                "displacement",
                "likelihood displacement: both denoising errors rose over the reference's by more"
                f" than {DISPLACEMENT:.0%} in the {WINDOW} steps up to step {step}; lower"
                " learning_rate, raise beta, or stop earlier",
            )

    def skip(self) -> None:
        """Count a step without an update."""
        self.skipped += 1
        self.skipped_in_a_row += 1

    def idle(self, step: int, reason: str) -> None:
        """Count a step with nothing to learn from; the first is announced, all are reported."""
        self.idle_steps += 1
        self.idle_in_a_row += 1
        self.idle_reason = reason
        if self.idle_steps == 1:
            logger.warning("step %d: %s; such steps are skipped and counted", step, reason)
        self._given["idle"] = f"{self.idle_steps} of the first {step} steps skipped: {reason}"

    def state_dict(self) -> dict[str, Any]:
        """Return the history, for a checkpoint."""
        return {
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "idle": [self.idle_steps, self.idle_in_a_row, self.idle_reason],
            "given": dict(self._given),
            "margins": list(self._margins),
            "rises": {side: list(rises) for side, rises in self._rises.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the history."""
        self.skipped = state["skipped"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        # Checkpoints of older versions do not count these.
        idle = state.get("idle", [0, 0, ""])
        self.idle_steps, self.idle_in_a_row, self.idle_reason = idle
        self._given = dict(state["given"])
        self._margins.extend(state["margins"])
        for side, rises in self._rises.items():
            rises.extend(state["rises"][side])

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._given:
            self._given[kind] = message
            logger.warning(message)
