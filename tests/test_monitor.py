from __future__ import annotations

import logging

import pytest

from mmalign.monitor import WINDOW, Monitor


def errors(chosen: float, rejected: float) -> dict[str, float]:
    return {
        "denoising_error/policy_chosen": chosen,
        "denoising_error/policy_rejected": rejected,
        "denoising_error/ref_chosen": 1.0,
        "denoising_error/ref_rejected": 1.0,
    }


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"rewards/margin": 25.0}, "saturated"),
        ({"rewards/margin": -25.0}, "saturated"),
        ({"rewards/margin": 15.0}, None),
        (errors(1.2, 1.3), "likelihood displacement"),
        (errors(0.9, 1.3), None),
        (errors(1.01, 1.3), None),
        ({"loss": 1.0}, None),
    ],
)
def test_monitor_warns_once(
    caplog: pytest.LogCaptureFixture, metrics: dict[str, float], expected: str | None
) -> None:
    monitor = Monitor()
    with caplog.at_level(logging.WARNING):
        for step in range(1, WINDOW):
            monitor.update(step, metrics)
        assert monitor.warnings == []
        for step in range(WINDOW, 3 * WINDOW):
            monitor.update(step, metrics)
    assert len(monitor.warnings) == len(caplog.records) == (expected is not None)
    if expected is not None:
        assert expected in monitor.warnings[0]


def test_monitor_forgets_a_margin_that_came_back() -> None:
    monitor = Monitor()
    for step in range(5 * WINDOW):
        monitor.update(step, {"rewards/margin": 0.0 if step % WINDOW == 0 else 30.0})
    assert monitor.warnings == []


def test_monitor_state_survives_a_resume() -> None:
    whole, first, second = Monitor(), Monitor(), Monitor()
    for step in range(WINDOW):
        whole.update(step, {"rewards/margin": 30.0})
        if step < 7:
            first.update(step, {"rewards/margin": 30.0})
    second.load_state_dict(first.state_dict())
    for step in range(7, WINDOW):
        second.update(step, {"rewards/margin": 30.0})
    assert second.warnings == whole.warnings != []
