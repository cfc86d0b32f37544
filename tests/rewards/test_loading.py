from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
import torch

import mmalign.rewards
from mmalign.config import RewardConfig
from mmalign.rewards import REWARDS, import_dotted, load_reward
from mmalign.rewards.brightness import BrightnessReward
from mmalign.rewards.jpeg import JpegReward
from mmalign.types import InputError

HERE = __name__


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, mmalign.rewards; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'open_clip', 'numpy', 'PIL')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", REWARDS)
def test_every_row_of_the_table_exists(name: str) -> None:
    target: Any = import_dotted(REWARDS[name])
    assert target.__name__.endswith("Reward")


def test_options_reach_the_class() -> None:
    reward = load_reward(RewardConfig(name="jpeg", options={"direction": "incompressibility"}))
    assert isinstance(reward, JpegReward)
    assert reward.sign == 1.0


def test_unknown_name_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown reward 'aesthetics': did you mean 'aesthetic'"):
        load_reward(RewardConfig(name="aesthetics"))


def test_unknown_option_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'qualty'.*direction, quality"):
        load_reward(RewardConfig(name="jpeg", options={"qualty": 3}))


def test_dotted_path_to_a_class_and_to_a_function() -> None:
    path = "mmalign.rewards.brightness:BrightnessReward"
    assert isinstance(load_reward(RewardConfig(name=path)), BrightnessReward)
    reward = load_reward(RewardConfig(name="operator:not_"))
    assert reward.name == "operator:not_"


def constant(images: torch.Tensor, prompts: list[str], value: float) -> list[float]:
    return [value] * len(prompts)


def test_options_reach_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "user_module", sys.modules[HERE])
    config = RewardConfig(name="user_module:constant", options={"value": 2.5})
    assert load_reward(config)(torch.zeros(2, 3, 1, 1), ["", ""]).tolist() == [2.5, 2.5]


class Nameless:
    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.mean((1, 2, 3))


def test_class_that_is_not_a_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "user_module", sys.modules[HERE])
    with pytest.raises(InputError, match="Nameless lacks one of name"):
        load_reward(RewardConfig(name="user_module:Nameless"))


def test_missing_module() -> None:
    with pytest.raises(InputError, match="cannot import 'no_such_module:f'"):
        load_reward(RewardConfig(name="no_such_module:f"))


def test_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    points = EntryPoints(
        [
            EntryPoint("shiny", "mmalign.rewards.brightness:BrightnessReward", "mmalign.rewards"),
            EntryPoint("broken", "no_such_module:Thing", "mmalign.rewards"),
        ]
    )
    monkeypatch.setattr(mmalign.rewards, "entry_points", lambda group: points.select(group=group))
    assert isinstance(load_reward(RewardConfig(name="shiny")), BrightnessReward)
    with pytest.raises(InputError, match="'broken' is installed but broken"):
        load_reward(RewardConfig(name="broken"))
    with pytest.raises(InputError, match="did you mean 'shiny'"):
        load_reward(RewardConfig(name="shinny"))


def test_every_reward_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    rows = {
        name
        for line in page.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert rows == set(REWARDS)
    linked = re.findall(r"\]\((\.\.[^)]+|\w[^):]*\.md)\)", page)
    assert linked
    assert all((Path(__file__).parents[2] / "docs" / link).exists() for link in linked)
    tested = re.findall(r"`(test_\w+\.py)`", page)
    assert all((Path(__file__).parent / name).exists() for name in tested)
