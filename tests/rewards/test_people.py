from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread, Timer

import pytest
import torch

from mmalign.config import RewardConfig
from mmalign.data.labels import Labels
from mmalign.rewards import load_reward
from mmalign.rewards import people as module
from mmalign.rewards.people import PeopleReward
from mmalign.types import InputError


def pictures(*levels: float) -> torch.Tensor:
    return torch.stack([torch.full((3, 4, 4), level) for level in levels])


@pytest.fixture
def reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PeopleReward:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    loaded = load_reward(RewardConfig(name="people", options={"folder": str(tmp_path / "people")}))
    assert isinstance(loaded, PeopleReward)
    return loaded


def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where the reward would wait."""

    def sleep(seconds: float) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(module.time, "sleep", sleep)


def person(folder: Path, name: str, prefers: Callable[[bytes, bytes], int], count: int) -> Thread:
    """Judge `count` pairs as they come; `prefers` gives -1, 0 or 1 for two files."""

    def work() -> None:
        labels = Labels(folder / "labels.sqlite")
        done = 0
        while done < count:
            for pair in labels.next_pairs(name, 10):
                data = [(folder / str(labels.path(i))).read_bytes() for i in pair[2:]]
                verdict = prefers(data[0], data[1])
                winner = None if not verdict else pair.left if verdict < 0 else pair.right
                labels.judge(name, pair.key, winner)
                done += 1
            time.sleep(0.005)
        labels.close()

    thread = Thread(target=work, daemon=True)
    thread.start()
    return thread


def brighter(left: bytes, right: bytes) -> int:
    from io import BytesIO

    from PIL import Image

    levels = [Image.open(BytesIO(data)).getpixel((0, 0)) for data in (left, right)]
    return -1 if levels[0] > levels[1] else 1  # type: ignore[operator]


def test_waits_for_people_and_asks_nothing_twice(
    reward: PeopleReward, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    samples, prompts = pictures(0.2, 0.9, 0.7, 0.1, 0.5, 0.4), ["a", "b"] * 3
    worker = person(reward.folder, "ann", brighter, 6)
    expected = [0.0, 1.0, 1.0, 0.0, 0.5, 0.5]  # a: .2 .7 .5, b: .9 .1 .4
    assert reward(samples, prompts).tolist() == expected
    worker.join()
    line = f"waiting for people to judge 6 pairs: mmalign pairs label {reward.folder}"
    assert line in caplog.text
    nobody(monkeypatch)
    again = PeopleReward(str(reward.folder))
    assert again(samples, prompts).tolist() == expected
    with pytest.raises(AssertionError, match="asked again"):
        again(pictures(0.2, 0.3), ["a", "a"])


def test_ties_and_samples_without_others(reward: PeopleReward) -> None:
    person(reward.folder, "ann", lambda left, right: 0, 1)
    samples = pictures(0.1, 0.2, 0.3, 0.4, 0.4)
    assert reward(samples, ["a", "a", "alone", "same", "same"]).tolist() == [0.5] * 5


def test_several_votes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    reward = PeopleReward(str(tmp_path), votes=3)
    for name in ("ann", "bob"):
        person(tmp_path, name, brighter, 1)
    person(tmp_path, "cy", lambda left, right: -brighter(left, right), 1)
    assert reward(pictures(0.1, 0.2), ["a", "a"]).tolist() == [0, 1]
    assert reward.labels.tallies()[0].votes == 3


def test_run_that_waits_can_be_ended(reward: PeopleReward) -> None:
    before = signal.getsignal(signal.SIGTERM)
    Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(SystemExit) as ended:
        reward(pictures(0.1, 0.2), ["a", "a"])
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="votes must be at least 1"):
        PeopleReward(str(tmp_path), votes=0)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        PeopleReward(str(tmp_path / "file"))
