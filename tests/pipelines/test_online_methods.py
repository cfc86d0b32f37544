"""Every online method trains on tiny checkpoints, with its invariants, and resumes bit for bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from threading import Thread
from time import sleep
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from mmalign.adapters import load_adapter
from mmalign.config import (
    D3poConfig,
    DraftConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    OnlineConfig,
    RewardConfig,
    RocmConfig,
    SamplingConfig,
    TailorpoConfig,
)
from mmalign.data.images import to_tensor
from mmalign.data.labels import Labels
from mmalign.pipelines import d3po, draft, rocm, tailorpo
from mmalign.pipelines._online import OnlineRun, PromptBatch, bridged_rewards
from mmalign.rewards import load_reward, load_rewards, people
from mmalign.rewards.brightness import BrightnessReward
from mmalign.rewards.combine import CombinedReward
from mmalign.types import InputError

RUNS: dict[str, Any] = {
    "d3po": (D3poConfig, d3po.run, {"clamp": "none"}),
    "tailorpo": (TailorpoConfig, tailorpo.run, {"train_steps": 2}),
    "tailorpo-g": (TailorpoConfig, tailorpo.run, {"guidance_step_size": 0.1}),
    "draft": (DraftConfig, draft.run, {"backprop_steps": 2, "kl_weight": 0.1}),
    "draft-lv": (DraftConfig, draft.run, {"num_lv_samples": 2, "kl_weight": 0.1}),
    "rocm": (RocmConfig, rocm.run, {}),
}
PREFERENCE = ["d3po", "tailorpo", "tailorpo-g"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("red\na red\nred red\n")
    return file


def train(
    method: str, model: Path, prompts: Path, output: Path, **more: Any
) -> list[dict[str, Any]]:
    config_class, run, extra = RUNS[method]
    options: dict[str, Any] = {
        "model": str(model),
        "output_dir": str(output),
        "device": "cpu",
        "offline": True,
        "prompts": str(prompts),
        "rewards": [RewardConfig(name="brightness")],
        "lora": LoraConfig(rank=2),
        "sampling": SamplingConfig(num_inference_steps=4, guidance_scale=2.0),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        **extra,
        **more,
    }
    config: OnlineConfig = config_class(**options)
    run(config)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("method", PREFERENCE)
@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl", "tiny_lcm"])
def test_first_step_is_at_the_reference(
    method: str, model: str, prompts: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    lines = train(method, request.getfixturevalue(model), prompts, tmp_path)
    first, last = lines[0], lines[-1]
    assert first["ties"] == 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["margin"] == 0
    assert last["margin"] != 0
    assert any(value.abs().max() > 0 for key, value in weights(tmp_path).items() if "lora_B" in key)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["method"], summary["steps"]) == (method, 3)
    assert (tmp_path / "report.html").stat().st_size > 0


@pytest.mark.parametrize(
    ("method", "model"),
    [
        ("draft", "tiny_sd"),
        ("draft", "tiny_sd_v"),
        ("draft-lv", "tiny_sd"),
        ("draft", "tiny_sdxl"),
        ("draft", "tiny_lcm"),
        ("draft-lv", "tiny_lcm"),
        ("rocm", "tiny_lcm"),
    ],
)
def test_reward_gradients_raise_the_reward(
    method: str, model: str, prompts: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    brightness = RewardConfig(name="brightness")
    lines = train(
        method,
        request.getfixturevalue(model),
        prompts,
        tmp_path,
        max_steps=10,
        evaluation=EvalConfig(prompts=str(prompts), images_per_prompt=2, rewards=[brightness]),
    )
    assert lines[0]["divergence"] == 0
    assert lines[-1]["divergence"] > 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["after"]["brightness"] > summary["before"]["brightness"]


@pytest.mark.parametrize("method", ["d3po", "tailorpo", "draft"])
def test_resumed_run_ends_where_an_undisturbed_one_does(
    method: str, tiny_sd: Path, prompts: Path, tmp_path: Path
) -> None:
    whole = train(method, tiny_sd, prompts, tmp_path / "whole", max_steps=4)
    train(method, tiny_sd, prompts, tmp_path / "parts", max_steps=2)
    parts = train(
        method,
        tiny_sd,
        prompts,
        tmp_path / "parts",
        max_steps=4,
        resume_from_checkpoint="latest",
    )
    assert parts == whole
    assert_close(weights(tmp_path / "parts"), weights(tmp_path / "whole"), atol=0, rtol=0)


def test_d3po_prefers_what_the_reward_prefers(tiny_sd: Path, prompts: Path, tmp_path: Path) -> None:
    lines = train("d3po", tiny_sd, prompts, tmp_path, max_steps=12, candidates=3, beta=10.0)
    assert sum(line["margin"] for line in lines[-4:]) > 0
    assert sum(line["rewards/accuracy"] for line in lines[-4:]) / 4 > 0.5


def test_d3po_compares_by_pareto_dominance(tiny_sd: Path, prompts: Path, tmp_path: Path) -> None:
    bright, dark = RewardConfig(name="brightness"), RewardConfig(name="brightness", weight=-2.0)
    options: dict[str, Any] = {"max_steps": 2, "preference": "pareto"}
    one = train("d3po", tiny_sd, prompts, tmp_path / "one", rewards=[bright], **options)
    plain = train("d3po", tiny_sd, prompts, tmp_path / "sum", rewards=[bright], max_steps=2)
    assert [line["loss"] for line in one] == [line["loss"] for line in plain]
    # What one reward gains the other loses: nobody dominates, although the sum decides.
    both = {"rewards": [bright, dark]}
    torn = train("d3po", tiny_sd, prompts, tmp_path / "sum of both", max_steps=2, **both)
    assert [line["ties"] for line in torn] == [0, 0]
    with pytest.raises(InputError, match="same reward as its rival"):
        train("d3po", tiny_sd, prompts, tmp_path / "both", **options, **both)


def test_d3po_trains_on_what_people_prefer(
    tiny_sd: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "people"
    rewards = [RewardConfig(name="people", options={"folder": str(folder)})]
    options: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "rewards": rewards}
    judging = Thread(target=judge_brighter, args=(folder / "labels.sqlite", 8), daemon=True)
    judging.start()
    whole = train("d3po", tiny_sd, prompts, tmp_path / "whole", **options)
    judging.join()
    assert [line["ties"] for line in whole] == [0, 0, 0, 0]
    assert all(line["grad_norm"] > 0 for line in whole)
    # From here on nobody is there: a run that is killed and resumed finds every answer.
    monkeypatch.setattr(people.time, "sleep", None)
    train("d3po", tiny_sd, prompts, tmp_path / "parts", **{**options, "max_steps": 2})
    options["resume_from_checkpoint"] = "latest"
    assert train("d3po", tiny_sd, prompts, tmp_path / "parts", **options) == whole
    # And it is the preference that the reward of the same taste gives.
    bright = [RewardConfig(name="brightness")]
    same = train("d3po", tiny_sd, prompts, tmp_path / "same", max_steps=4, rewards=bright)
    assert [line["loss"] for line in same] == [line["loss"] for line in whole]


def judge_brighter(file: Path, count: int) -> None:
    reward = load_reward(RewardConfig(name="brightness"))
    while not file.exists():
        sleep(0.01)
    labels = Labels(file)
    for _ in range(count):
        while not (shown := labels.next_pairs("ann", 1)):
            sleep(0.01)
        sides = (shown[0].left, shown[0].right)
        images = [to_tensor(Image.open(file.parent / str(labels.path(key)))) for key in sides]
        best = int(reward(torch.stack(images), ["", ""]).argmax())
        labels.judge("ann", shown[0].key, sides[best])
    labels.close()


@pytest.mark.parametrize("method", ["draft", "draft-lv", "rocm", "tailorpo-g"])
def test_reward_without_gradient_is_refused(
    method: str, tiny_sd: Path, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="jpeg"):
        train(method, tiny_sd, prompts, tmp_path, rewards=[RewardConfig(name="jpeg")])


def test_judge_must_not_train(tiny_sd: Path, prompts: Path, tmp_path: Path) -> None:
    evaluation = EvalConfig(prompts=str(prompts), judge=RewardConfig(name="brightness"))
    with pytest.raises(InputError, match="judge"):
        train("draft", tiny_sd, prompts, tmp_path, evaluation=evaluation)


@pytest.mark.parametrize("method", ["d3po", "tailorpo"])
def test_deterministic_sampler_is_refused(
    method: str, tiny_sd: Path, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="eta"):
        train(method, tiny_sd, prompts, tmp_path, eta=0.0)


def test_options_are_checked(tiny_sd: Path, prompts: Path, tmp_path: Path) -> None:
    for method, more in (
        ("draft", {"backprop_steps": 5}),
        ("draft-lv", {"backprop_steps": 2}),
        ("d3po", {"candidates": 1}),
        ("tailorpo", {"first_trained_step": 4}),
        ("rocm", {}),  # not a consistency model
    ):
        with pytest.raises(InputError):
            train(method, tiny_sd, prompts, tmp_path, **more)


@pytest.mark.parametrize("decode_batch_size", [1, 2, 3])
def test_bridged_gradient_is_the_whole_gradient(tiny_sd: Path, decode_batch_size: int) -> None:
    adapter = load_adapter(ModelConfig(model=str(tiny_sd)), device="cpu")
    reward = CombinedReward(load_rewards([RewardConfig(name="brightness")]))
    online: Any = OnlineRun(
        config=OnlineConfig(),
        run=type("Run", (), {"adapter": adapter})(),
        reward=reward,
        rewards=reward.each,
        negative={},
        grid=adapter.sampler_grid(2),
    )
    start = torch.randn(
        3, *adapter.latent_shape(16, 16), generator=torch.Generator().manual_seed(0)
    )
    gradients, values = [], []
    for bridged in (True, False):
        leaf = start.clone().requires_grad_()
        latents, prompts = leaf * 2, ["red"] * 3
        if bridged:
            batch = PromptBatch(tuple(prompts), (), (), ("a", "b", "c"), {})
            rewards = bridged_rewards(online, latents, batch, decode_batch_size)
        else:
            rewards = reward(adapter.decode(latents), prompts)
        (rewards * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        gradients.append(leaf.grad)
        values.append(rewards.detach())
    assert_close(values[0], values[1])
    assert gradients[1].abs().max() > 0
    assert_close(gradients[0], gradients[1])


def darkness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return 1 - BrightnessReward()(images, prompts)


@pytest.mark.parametrize("method", ["d3po", "draft"])
def test_eval_only_rewards_are_logged_and_reported_but_train_nothing(
    method: str, tiny_sd: Path, prompts: Path, tmp_path: Path
) -> None:
    brightness = RewardConfig(name="brightness")
    watched = RewardConfig(name=f"{__name__}:darkness", weight=50.0, eval_only=True)
    evaluation = EvalConfig(prompts=str(prompts), images_per_prompt=1, every_steps=2)
    alone, both = tmp_path / "alone", tmp_path / "both"
    train(method, tiny_sd, prompts, alone, rewards=[brightness])
    lines = train(
        method, tiny_sd, prompts, both, rewards=[brightness, watched], evaluation=evaluation
    )
    for name, value in weights(alone).items():
        assert torch.equal(value, weights(both)[name])
    for line in lines:
        total = line["reward/brightness"] + line[f"reward/{watched.name}"]
        assert total == pytest.approx(1.0, abs=1e-5)
    summary = json.loads((both / "summary.json").read_text())
    assert watched.name in summary["before"]
    curve = [json.loads(line) for line in (both / "evaluations.jsonl").read_text().splitlines()]
    assert all(watched.name in line for line in curve)
    assert watched.name in (both / "report.html").read_text()


@pytest.mark.parametrize("more", [{"combine": "gdpo"}, {"combine": "zscore"}])
def test_gradients_want_no_comparison_of_samples(
    more: dict[str, Any], tiny_sd: Path, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="draft follows the gradient of each sample by itself"):
        train("draft", tiny_sd, prompts, tmp_path, **more)


def test_d3po_on_gdpo(tiny_sd: Path, prompts: Path, tmp_path: Path) -> None:
    rewards = [RewardConfig(name="brightness"), RewardConfig(name="saturation", weight=0.5)]
    lines = train("d3po", tiny_sd, prompts, tmp_path, rewards=rewards, combine="gdpo")
    assert [line["ties"] for line in lines] == [0, 0, 0]
    assert all(abs(line["reward"]) < 1e-5 for line in lines)
