"""Rewards that score a sample against the others of its prompt are given whole prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tars import plain, write_tar
from torch import Tensor
from torch.testing import assert_close

from mmalign import cli
from mmalign.config import ModelConfig, OnlineConfig, RewardConfig
from mmalign.data.files import write_jsonl
from mmalign.data.images import save_png
from mmalign.pipelines import _responses, _subject_scores
from mmalign.pipelines._cached import CachedReward
from mmalign.pipelines._online import OnlineRun, PromptBatch, bridged_rewards
from mmalign.rewards import load_reward, load_rewards
from mmalign.rewards.combine import CombinedReward
from mmalign.types import Response

COUNT = 15
IMAGES = torch.randint(0, 256, (COUNT, 3, 48, 48), generator=torch.Generator().manual_seed(0)) / 255
PROMPTS = [f"thing {index % 3}" for index in range(COUNT)]
MOST = [10**9]


def spread(samples: Any, prompts: Sequence[str]) -> Tensor:
    """How far a sample is from the mean of its prompt's samples in the call."""
    if len(samples) > MOST[0]:
        raise MemoryError
    if isinstance(samples, Tensor):
        values = samples.flatten(1).mean(1)
    else:
        values = torch.tensor([float(len(sample.text)) for sample in samples])
    same = torch.tensor([[float(a == b) for a in prompts] for b in prompts]).to(values)
    return (values - (same @ values) / same.sum(1)).square()


SPREAD = {"function": f"{__name__}:spread", "scores_sets": True, "differentiable": True}
BY_SPREAD = RewardConfig(name="callable", options=SPREAD)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Fifteen pictures of three prompts, which take turns."""
    folder = tmp_path / "pictures"
    for index, image in enumerate(IMAGES):
        save_png(image, folder / f"{index:02d}.png")
    rows = [{"file_name": f"{i:02d}.png", "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    write_jsonl(folder / "metadata.jsonl", rows)
    return folder


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def truth(options: Mapping[str, str]) -> Tensor:
    with torch.no_grad():
        return load_reward(RewardConfig(name="lpips", options=dict(options)))(IMAGES, PROMPTS)


def test_scores_of_a_smaller_set_are_not_kept(
    lpips_options: Mapping[str, str], tmp_path: Path
) -> None:
    config = RewardConfig(name="lpips", options=dict(lpips_options))
    reward = load_reward(config)
    cached = CachedReward(reward, config, str(tmp_path / "cache"))
    names = [f"{index}.png" for index in range(5)]
    cached(IMAGES[:3], ["p"] * 3, names[:3])
    found = cached(IMAGES[:5], ["p"] * 5, names)
    assert found == pytest.approx(reward(IMAGES[:5], ["p"] * 5).tolist(), rel=1e-6)


@pytest.mark.parametrize("batch_size", [2, 7, 64])
def test_score(
    batch_size: int, pictures: Path, lpips_options: Mapping[str, str], tmp_path: Path
) -> None:
    arguments = ["score", "--images", str(pictures), "--reward", '["lpips", "brightness"]']
    arguments += ["--options", json.dumps({"lpips": lpips_options})]
    arguments += ["--batch_size", str(batch_size), "--output", str(tmp_path / "scores.jsonl")]
    assert cli.main(arguments) == 0
    rows = lines(tmp_path / "scores.jsonl")
    assert [row["file_name"] for row in rows] == [f"{index:02d}.png" for index in range(COUNT)]
    assert_close(torch.tensor([row["lpips"] for row in rows]), truth(lpips_options))
    luma = load_reward(RewardConfig(name="brightness"))(IMAGES, PROMPTS)
    assert_close(torch.tensor([row["brightness"] for row in rows]), luma)


def test_evaluate_image(
    pictures: Path,
    lpips_options: Mapping[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_subject_scores, "BATCH", 4)
    rewards = [
        {"name": "lpips", "batch_size": 3, "options": dict(lpips_options)},
        {"name": "saturation"},
    ]
    arguments = ["evaluate", "image", "--compare", f"a={pictures}", f"b={pictures}"]
    arguments += ["--evaluation.rewards", json.dumps(rewards), "--evaluation.judge.name", "jpeg"]
    arguments += ["--evaluation.images_per_prompt", "5", "--output_dir", str(tmp_path / "run")]
    assert cli.main(arguments) == 0
    rows = json.loads((tmp_path / "run" / "scores.json").read_text())[:COUNT]
    expected = truth(lpips_options)
    for row in rows:  # prompt by prompt there
        index = PROMPTS.index(row["prompt"]) + 3 * row["number"]
        assert row["lpips"] == pytest.approx(float(expected[index]), rel=1e-5)
        for name in ("saturation", "jpeg"):
            reward = load_reward(RewardConfig(name=name))
            score = float(reward(IMAGES[index : index + 1], [""])[0])
            assert row[name] == pytest.approx(score, rel=1e-5)


def build(pictures: Path, output: Path, **reward: Any) -> list[str]:
    rewards = json.dumps([{"name": "callable", "options": SPREAD, **reward}])
    arguments = ["pairs", "build", "--images", str(pictures), "--rewards", rewards]
    return [*arguments, "--prompts", str(pictures / "metadata.jsonl"), "--output", str(output)]


def test_pairs_build(pictures: Path, tmp_path: Path) -> None:
    assert cli.main(build(pictures, tmp_path / "out", batch_size=2)) == 0
    found = {row["file_name"]: row["score"] for row in lines(tmp_path / "out" / "scores.jsonl")}
    expected = spread(IMAGES, PROMPTS).tolist()
    assert [found[f"{i:02d}.png"] for i in range(COUNT)] == pytest.approx(expected, rel=1e-2)


def test_pictures_of_several_sizes_cannot_be_compared(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_png(IMAGES[4, :, :40], pictures / "04.png")  # of the second prompt
    scored = ["score", "--images", str(pictures), "--reward", "callable"]
    scored += ["--options", json.dumps({"callable": SPREAD}), "--output", str(tmp_path / "s.jsonl")]
    for arguments in (scored, build(pictures, tmp_path / "out")):
        assert cli.main(arguments) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert "compares the images of a prompt, and those of 'thing 1' have several sizes" in said
        assert "48x48, 48x40" in said


def test_a_prompt_that_memory_cannot_hold_is_named(
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "MOST", [4])
    assert cli.main(build(pictures, tmp_path / "out")) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "runs out of memory on the 5 samples of 'thing 0', which it compares" in said


@pytest.mark.parametrize("job", ["score", "pairs build"])
def test_shards_are_refused(job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "0.tar", [("0.png", plain(0)), ("0.txt", b"a")])
    arguments = [*job.split(), "--images", str(tmp_path / "*.tar"), "--output", str(tmp_path / "o")]
    if job == "score":
        arguments += ["--reward", "callable", "--options", json.dumps({"callable": SPREAD})]
    else:
        arguments += ["--rewards", json.dumps([{"name": "callable", "options": SPREAD}])]
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "compares the images of a prompt, which shards do not keep together" in said


def test_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_responses, "BATCH", 4)
    config = RewardConfig(name="callable", options={**SPREAD, "modality": "text"}, batch_size=2)
    reward = CachedReward(load_reward(config, modality="text"), config)
    answers = [Response(text="a" * index) for index in range(COUNT)]
    rows = [
        _responses.Answered(f"row {index}", {}, prompt, answer)
        for index, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True))
    ]
    found = _responses.score_responses(rows, {"spread": reward})["spread"]
    assert found == pytest.approx(spread(answers, PROMPTS).tolist(), rel=1e-6)


def test_bridged_gradients(tiny_sd: Path) -> None:
    from mmalign.adapters import load_adapter

    adapter = load_adapter(ModelConfig(model=str(tiny_sd)), device="cpu")
    reward = CombinedReward(load_rewards([BY_SPREAD]))
    online: Any = OnlineRun(
        config=OnlineConfig(),
        run=type("Run", (), {"adapter": adapter})(),
        reward=reward,
        rewards=reward.each,
        negative={},
        grid=adapter.sampler_grid(2),
        scores_sets=reward.scores_sets,
    )
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, *adapter.latent_shape(16, 16), generator=generator)
    batch, found = PromptBatch(("red", "blue"), (), (), ("a", "b"), {}), []
    for bridged in (True, False):
        leaf = start.clone().requires_grad_()
        if bridged:
            scores = bridged_rewards(online, leaf * 2, batch, 1)
        else:
            scores = reward(adapter.decode(leaf * 2), batch.prompts * 2)
        (scores * torch.tensor([1.0, 2.0, 1.0, 2.0])).sum().backward()  # of a prompt, all alike
        found.append((scores.detach(), leaf.grad))
    assert found[1][1].abs().max() > 0
    assert_close(found[0], found[1], rtol=1e-4, atol=1e-8)
