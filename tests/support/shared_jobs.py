"""Small runs of every method, for one process and for two at the same global batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmalign.config import (
    CandidatesConfig,
    ConsistencyDpoConfig,
    CurriculumConfig,
    CurriculumDpoConfig,
    D3poConfig,
    DiffusionDpoConfig,
    DiffusionKtoConfig,
    DraftConfig,
    DroConfig,
    EvalConfig,
    GenerationConfig,
    LoraConfig,
    MapoConfig,
    OnlineDpoConfig,
    PairsConfig,
    RewardConfig,
    RocmConfig,
    SamplingConfig,
    TailorpoConfig,
    TrialConfig,
    VlmDpoConfig,
    VlmLoraConfig,
    VlmPairsConfig,
    is_installed,
)
from mmalign.data.files import write_jsonl
from mmalign.data.images import save_png
from mmalign.evaluation import win_rate
from mmalign.pipelines import (
    consistency_dpo,
    curriculum_dpo,
    d3po,
    diffusion_dpo,
    diffusion_kto,
    draft,
    dro,
    mapo,
    online_dpo,
    rocm,
    tailorpo,
    vlm_dpo,
)
from mmalign.pipelines._vlm_trial import TrialResult
from mmalign.types import Question, VlmAdapter

BRIGHTNESS = RewardConfig(name="brightness")
LAUNCHED = {"ACCELERATE_USE_FSDP": "sharded", "ACCELERATE_USE_DEEPSPEED": "deepspeed"}
"""What the launcher sets for runs with these in their names."""


class World(NamedTuple):
    """Models and data that all runs share."""

    folder: Path
    sd: Path
    lcm: Path
    llava: Path

    @property
    def prompts(self) -> str:
        return str(self.folder / "prompts.txt")


class Job(NamedTuple):
    """A run by what is particular to it; `samples` of a step on one process."""

    config: type[Any]
    run: Callable[[Any], object]
    options: Callable[[World], dict[str, Any]]
    accumulate: int = 1


def pairs(world: World, **more: Any) -> dict[str, Any]:
    path = str(world.folder / "pairs")
    return {
        "model": str(world.sd),
        "beta": 10.0,
        "pairs": PairsConfig(path=path, resolution=16),
        **more,
    }


def sampled(world: World, **more: Any) -> dict[str, Any]:
    return {
        "model": str(world.sd),
        "prompts": world.prompts,
        "rewards": [BRIGHTNESS],
        "sampling": SamplingConfig(num_inference_steps=3, guidance_scale=2.0),
        **more,
    }


def vlm(world: World, **more: Any) -> dict[str, Any]:
    return {
        "model": str(world.llava),
        "lora": VlmLoraConfig(rank=2, alpha=4),
        "pairs": VlmPairsConfig(path=str(world.folder / "answers.jsonl")),
        **more,
    }


class SaysYes:
    """A trial of numbers that any change of the model moves."""

    def __init__(self, *, seed: int, generation: GenerationConfig) -> None:
        colors = [(51 * n, 255 - 51 * n, 90) for n in range(5)]
        pictures = [Image.new("RGB", (16, 16), color) for color in colors]
        self.questions = [Question("A red circle?", (picture,)) for picture in pictures]
        self.generation = generation

    def listen(self, adapter: VlmAdapter) -> tuple[list[str], list[float]]:
        said = adapter.generate(self.questions, self.generation)
        return said, [yes / (yes + no) for yes, no in adapter.yes_no(self.questions, 2)]

    def compare(self, before: Any, after: Any, shown: int) -> TrialResult:
        scores = [
            {f"yes_{i}": v for i, v in enumerate(side[1])}
            | {f"length_{i}": float(len(text)) for i, text in enumerate(side[0])}
            for side in (before, after)
        ]
        result = win_rate(after[1], before[1], ["a", "b", "c", "d", "e"], seed=0)
        return TrialResult(
            before=scores[0],
            after=scores[1],
            changes={},
            win_rate=result,
            judge="yes_0",
            answers=[],
        )


def tried(world: World) -> dict[str, Any]:
    short = GenerationConfig(max_new_tokens=5, batch_size=2)
    return vlm(world, trial=TrialConfig(name=f"{__name__}:SaysYes"), generation=short)


def held_out(world: World) -> dict[str, Any]:
    pairs = VlmPairsConfig(path=str(world.folder / "answers.jsonl"))
    short = GenerationConfig(max_new_tokens=3)
    return vlm(world, eval_pairs=pairs, num_answers=2, generation=short, cache_reference=False)


def rounds(world: World) -> dict[str, Any]:
    candidates = CandidatesConfig(
        prompts=world.prompts,
        candidates_per_prompt=2,
        rewards=[BRIGHTNESS],
        sampling=SamplingConfig(num_inference_steps=2, guidance_scale=1.0, batch_size=2),
    )
    # Pictures of the second round are rounded to 8 bits, where a last bit may become a grey level.
    more = {"rounds": 2, "curriculum": None, "candidates": candidates, "max_steps": 1, "beta": 0.1}
    return pairs(world, pairs=PairsConfig(resolution=16), **more)


def evaluated(world: World) -> dict[str, Any]:
    """Evaluate while training, and stop when it no longer helps."""
    options = pairs(world, learning_rate=0.05)
    del options["beta"]
    evaluation = EvalConfig(
        prompts=world.prompts,
        images_per_prompt=2,
        rewards=[BRIGHTNESS],
        every_steps=1,
        early_stopping_metric="diversity",
        early_stopping_patience=1,
    )
    sampling = SamplingConfig(num_inference_steps=2, guidance_scale=2.0, batch_size=2)
    return {**options, "max_steps": 4, "evaluation": evaluation, "sampling": sampling}


JOBS = {
    "diffusion-dpo": Job(DiffusionDpoConfig, diffusion_dpo.run, lambda w: pairs(w, num_draws=2), 2),
    "curriculum-dpo": Job(
        CurriculumDpoConfig,
        curriculum_dpo.run,
        lambda w: pairs(w, curriculum=CurriculumConfig(num_buckets=2, stage_steps=1)),
    ),
    "consistency-dpo": Job(
        ConsistencyDpoConfig,
        consistency_dpo.run,
        lambda w: pairs(w, model=str(w.lcm), teacher=str(w.sd)),
    ),
    "mapo": Job(MapoConfig, mapo.run, lambda w: pairs(w, beta=1.0, score_scale=1.0)),
    "kto": Job(DiffusionKtoConfig, diffusion_kto.run, pairs),
    "dro": Job(DroConfig, dro.run, evaluated),
    "online-dpo": Job(OnlineDpoConfig, online_dpo.run, rounds),
    "d3po": Job(
        D3poConfig,
        d3po.run,
        lambda w: sampled(
            w,
            clamp="none",
            train_steps=1,
            rewards=[RewardConfig(name="brightness", normalize="zscore")],
        ),
        2,
    ),
    "tailorpo": Job(
        TailorpoConfig,
        tailorpo.run,
        lambda w: sampled(w, train_steps=1, guidance_step_size=0.1, beta=1.0),
    ),
    "draft": Job(DraftConfig, draft.run, lambda w: sampled(w, backprop_steps=2, kl_weight=0.1)),
    "rocm": Job(RocmConfig, rocm.run, lambda w: sampled(w, model=str(w.lcm))),
    "vlm-dpo": Job(VlmDpoConfig, vlm_dpo.run, tried, 2),
    "vlm-sharded": Job(VlmDpoConfig, vlm_dpo.run, held_out, 2),
    "vlm-sharded-full": Job(
        VlmDpoConfig,
        vlm_dpo.run,
        lambda w: vlm(w, lora=VlmLoraConfig(enabled=False), cache_reference=False),
    ),
    "vlm-deepspeed": Job(VlmDpoConfig, vlm_dpo.run, held_out, 2),
    "vlm-deepspeed-recomputed": Job(
        VlmDpoConfig,
        vlm_dpo.run,
        lambda w: vlm(w, gradient_checkpointing=True, cache_reference=False),
    ),
    "vlm-token-level": Job(
        VlmDpoConfig, vlm_dpo.run, lambda w: vlm(w, preset="opa_token_level", cache_reference=False)
    ),
}
JOBS |= {
    f"{name}-deepspeed": job for name, job in list(JOBS.items()) if not name.startswith("vlm")
} | {
    "recomputed-deepspeed": Job(
        DiffusionDpoConfig, diffusion_dpo.run, lambda w: pairs(w, gradient_checkpointing=True)
    )
}


def configure(name: str, world: World, output: Path, processes: int, **more: Any) -> Any:
    """Configure a run of two steps of four samples; of two with accumulation."""
    job = JOBS[name]
    own = job.options(world)
    return job.config(
        **{
            "output_dir": str(output),
            "device": "cpu",
            "offline": True,
            "lora": LoraConfig(rank=2),
            "max_steps": 2,
            "per_device_train_batch_size": 4 // job.accumulate // processes,
            "gradient_accumulation_steps": job.accumulate,
            "learning_rate": 1e-3,
            # Adam's first steps have the size of the learning rate whatever the gradient, which
            # blows up the last bits of gradients that are almost 0; a large epsilon does not.
            "adam_epsilon": 1e-2,
            **own,
            **more,
        }
    )


def run(name: str, world: World, output: Path, processes: int, **more: Any) -> None:
    JOBS[name].run(configure(name, world, output, processes, **more))


def runs_here(name: str) -> bool:
    return "deepspeed" not in name or is_installed("deepspeed")


def lines(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def trained(output: Path) -> dict[str, torch.Tensor]:
    folder = output / ("adapter" if (output / "adapter").is_dir() else "model")
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def check_same(name: str, world: World, two: Path, tolerance: float = 1e-6) -> None:
    """Train in this process, and compare log, weights and cost with what others have trained."""
    one = world.folder / "one" / name
    run(name, world, one, 1)
    alone, shared = lines(one), lines(two / name)
    assert len(alone) == len(shared) > 0
    for a, b in zip(alone, shared, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if "accuracy" in key and a["step"] == 1:
                continue  # the share of margins above 0, which are rounding before any update
            # A z-score divides by what the rewards of tiny random models differ by, and a margin is
            # the difference of sums of log-probs, whose last bits are so large.
            rough = (name[:4], key) == ("d3po", "reward") or (name[:3], key) == ("vlm", "margin")
            limit = 1e-5 if rough else tolerance
            assert b[key] == pytest.approx(a[key], rel=tolerance, abs=limit), (key, a, b)
    weights, others = trained(one), trained(two / name)
    assert weights.keys() == others.keys()
    if (one / "adapter").is_dir() and not name.startswith(
        "dro"
    ):  # whose best weights may be the first
        assert any("lora_B" in key and value.abs().max() > 1e-6 for key, value in weights.items())
    for key, value in weights.items():
        torch.testing.assert_close(others[key], value, rtol=0, atol=tolerance)
    costs = [json.loads((o / "summary.json").read_text())["cost"] for o in (one, two / name)]
    for key in costs[0].keys() & {"unet_forwards", "unet_backwards", "reward_queries"}:
        assert costs[0][key] == costs[1][key] > 0 or key == "reward_queries", (key, costs)


def save_data(folder: Path) -> None:
    """Write pairs of noise pictures with scores, answers about them, and prompts."""
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        save_png(torch.rand(3, 16, 16, generator=generator), folder / f"pairs/{number}.png")
    rows = [
        {
            "prompt": prompt,
            "chosen_file_name": f"{number}.png",
            "rejected_file_name": f"{(number + gap) % 6}.png",
            "score_chosen": 0.9,
            "score_rejected": 0.9 - gap / 4,
            "pair_id": f"{number}-{gap}",
        }
        for number, prompt in enumerate(["red", "a red", "red red"])
        for gap in (1, 2)
    ]
    write_jsonl(folder / "pairs" / "metadata.jsonl", rows)
    answers = [
        {
            "image": f"pairs/{number}.png",
            "prompt": "<image>\nDescribe",
            "chosen": "A red circle" + " and one" * number,
            "rejected": f"No blue square {number}.",
            "revised": f"A blue circle {number}.",
        }
        for number in range(6)
    ]
    write_jsonl(folder / "answers.jsonl", answers)
    (folder / "prompts.txt").write_text("red\na red\nred red\na\n")
