"""Every offline method trains three steps on tiny checkpoints, with its invariants."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from skimage import data as photographs

from mmalign.config import (
    ConsistencyDpoConfig,
    CurriculumConfig,
    CurriculumDpoConfig,
    DiffusionDpoConfig,
    DiffusionKtoConfig,
    DroConfig,
    LoraConfig,
    MapoConfig,
    OfflineConfig,
    PairsConfig,
)
from mmalign.data.writers import write_pairs
from mmalign.pipelines import (
    consistency_dpo,
    curriculum_dpo,
    diffusion_dpo,
    diffusion_kto,
    dro,
    mapo,
)
from mmalign.types import ImageRef, InputError, PreferencePair

RUNS: dict[str, Any] = {
    "diffusion-dpo": (DiffusionDpoConfig, diffusion_dpo.run),
    "consistency-dpo": (ConsistencyDpoConfig, consistency_dpo.run),
    "curriculum-dpo": (CurriculumDpoConfig, curriculum_dpo.run),
    "mapo": (MapoConfig, mapo.run),
    "diffusion-kto": (DiffusionKtoConfig, diffusion_kto.run),
    "dro": (DroConfig, dro.run),
}


def photo(name: str, box: tuple[int, int, int, int] = (0, 0, 48, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(getattr(photographs, name)()).convert("RGB").crop(box).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prompts with two pairs each, of real photographs, with scores."""
    folder = tmp_path_factory.mktemp("pairs")
    names = ["astronaut", "coffee", "chelsea"]
    rows = []
    for index, prompt in enumerate(["red", "a red", "red red"]):
        images = [
            ImageRef(photo(names[index], (40 * k, 0, 40 * k + 40, 40)), f"{index}/{k}")
            for k in range(3)
        ]
        for worse, score in ((1, 0.6), (2, 0.1)):
            rows.append(
                PreferencePair(
                    pair_id=f"{index}-{worse}",
                    prompt=prompt,
                    chosen=images[0],
                    rejected=images[worse],
                    score_chosen=0.9,
                    score_rejected=score,
                    margin=0.9 - score,
                )
            )
    write_pairs(rows, folder, "imagefolder")
    return folder


def options(model: Path, pairs: Path, output: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "output_dir": str(output),
        "device": "cpu",
        "offline": True,
        "lora": LoraConfig(rank=2),
        "pairs": PairsConfig(
            path=str(pairs), resolution=16, cache_latents=more.pop("cache_latents", True)
        ),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        **more,
    }


def train(method: str, model: Path, pairs: Path, output: Path, **more: Any) -> list[dict[str, Any]]:
    config_class, run = RUNS[method]
    config: OfflineConfig = config_class(**options(model, pairs, output, **more))
    run(config)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize(
    ("method", "model"),
    [
        ("diffusion-dpo", "tiny_sd"),
        ("diffusion-dpo", "tiny_sd_v"),
        ("diffusion-dpo", "tiny_sdxl"),
        ("curriculum-dpo", "tiny_sd"),
        ("consistency-dpo", "tiny_lcm"),
    ],
)
def test_first_step_is_at_the_reference(
    method: str, model: str, pairs: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    more: dict[str, Any] = {}
    if method == "consistency-dpo":
        more["teacher"] = str(request.getfixturevalue("tiny_sd"))
    if method == "curriculum-dpo":
        more["curriculum"] = CurriculumConfig(num_buckets=2, stage_steps=1)
    lines = train(method, request.getfixturevalue(model), pairs, tmp_path, **more)
    assert len(lines) == 3
    first, last = lines[0], lines[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margin"] == 0
    assert first["denoising_error/policy_chosen"] == first["denoising_error/ref_chosen"]
    assert last["loss"] != pytest.approx(math.log(2), abs=1e-4)
    assert any(value.abs().max() > 0 for key, value in adapter(tmp_path).items() if "lora_B" in key)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["method"], summary["steps"]) == (method, 3)
    for name in ("config.yaml", "report.html", "README.md"):
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize("method", ["mapo", "diffusion-kto", "dro"])
def test_other_methods_train(method: str, tiny_sd: Path, pairs: Path, tmp_path: Path) -> None:
    lines = train(method, tiny_sd, pairs, tmp_path)
    assert len(lines) == 3
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)


def test_curriculum_logs_its_stage(tiny_sd: Path, pairs: Path, tmp_path: Path) -> None:
    curriculum = CurriculumConfig(num_buckets=2, stage_steps=2)
    lines = train("curriculum-dpo", tiny_sd, pairs, tmp_path, curriculum=curriculum)
    assert [line["stage"] for line in lines] == [0, 0, 1]


@pytest.mark.parametrize(
    "change",
    [
        {"split_pair_backward": True},
        {"cache_latents": False},
        {"gradient_checkpointing": True},
    ],
    ids=["split", "live", "checkpointing"],
)
def test_cheaper_ways_train_the_same(
    change: dict[str, Any], tiny_sd: Path, pairs: Path, tmp_path: Path
) -> None:
    # Adam's first steps have the size of the learning rate whatever the gradient, and beta
    # multiplies the errors: large values of either would blow up differences in the last bits.
    common = {"beta": 50.0, "learning_rate": 1e-4}
    plain = train("diffusion-dpo", tiny_sd, pairs, tmp_path / "plain", **common)
    other = train("diffusion-dpo", tiny_sd, pairs, tmp_path / "other", **common, **change)
    for a, b in zip(plain, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_cached_reference_errors_are_the_computed_ones(
    tiny_sd: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"num_draws": 1, "max_steps": 7, "beta": 500.0}
    cached = train("diffusion-dpo", tiny_sd, pairs, tmp_path / "cached", **settings)
    monkeypatch.setattr(diffusion_dpo, "DenoisingMeasure", _uncached)
    computed = train("diffusion-dpo", tiny_sd, pairs, tmp_path / "computed", **settings)
    for a, b in zip(cached, computed, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)


def _uncached(run: Any, *, cache: bool) -> Any:
    from mmalign.pipelines._steps import DenoisingMeasure

    assert cache
    return DenoisingMeasure(run, cache=False)


@pytest.mark.parametrize("draws", [0, 1])
def test_resumed_run_equals_the_uninterrupted_one(
    draws: int, tiny_sd: Path, pairs: Path, tmp_path: Path
) -> None:
    curriculum = CurriculumConfig(num_buckets=2, stage_steps=3)
    settings = {"curriculum": curriculum, "num_draws": draws, "save_steps": 2}
    whole = train("curriculum-dpo", tiny_sd, pairs, tmp_path / "a", max_steps=6, **settings)
    train("curriculum-dpo", tiny_sd, pairs, tmp_path / "b", max_steps=6, **settings)
    checkpoints = tmp_path / "b" / "checkpoints"
    latest = sorted(checkpoints.iterdir())[-1]
    for part in latest.iterdir():
        part.unlink()  # as if the run had been killed after step 4
    latest.rmdir()
    resumed = train(
        "curriculum-dpo",
        tiny_sd,
        pairs,
        tmp_path / "b",
        max_steps=6,
        resume_from_checkpoint="latest",
        **settings,
    )
    assert resumed == whole
    first, second = adapter(tmp_path / "a"), adapter(tmp_path / "b")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_other_options_of_a_resumed_run_are_named(
    tiny_sd: Path, pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train("diffusion-dpo", tiny_sd, pairs, tmp_path, beta=100.0)
    more = {"max_steps": 4, "resume_from_checkpoint": "latest"}
    train("diffusion-dpo", tiny_sd, pairs, tmp_path, beta=100.0, **more)
    assert "other options" not in caplog.text
    train("diffusion-dpo", tiny_sd, pairs, tmp_path, beta=50.0, **{**more, "max_steps": 5})
    assert "continues with other options than it began with: beta: 100.0 -> 50.0" in caplog.text


def test_reference_is_the_base_after_training(tiny_sd: Path, pairs: Path, tmp_path: Path) -> None:
    before = load_file(next((tiny_sd / "unet").glob("*.safetensors")))
    train("diffusion-dpo", tiny_sd, pairs, tmp_path)
    after = load_file(next((tiny_sd / "unet").glob("*.safetensors")))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_full_fine_tuning_saves_a_model(tiny_sd: Path, pairs: Path, tmp_path: Path) -> None:
    lines = train(
        "diffusion-dpo", tiny_sd, pairs, tmp_path, lora=LoraConfig(enabled=False), beta=500.0
    )
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    trained = StableDiffusionPipeline.from_pretrained(tmp_path / "model").unet.state_dict()
    base = StableDiffusionPipeline.from_pretrained(tiny_sd).unet.state_dict()
    assert any(not torch.equal(trained[key], base[key]) for key in base)
    assert 'from_pretrained("model")' in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("mode", ["ema", "copy"])
def test_moving_reference_leaves_the_start(
    mode: str, tiny_sd: Path, pairs: Path, tmp_path: Path
) -> None:
    settings = {"reference_decay": 0.5, "reference_update_steps": 1, "max_steps": 4}
    fixed = train("diffusion-dpo", tiny_sd, pairs, tmp_path / "fixed", max_steps=4)
    moving = train(
        "diffusion-dpo", tiny_sd, pairs, tmp_path / "moving", reference_update=mode, **settings
    )
    assert moving[0]["loss"] == pytest.approx(fixed[0]["loss"], abs=1e-6)
    assert moving[-1]["denoising_error/ref_chosen"] != fixed[-1]["denoising_error/ref_chosen"]


def test_folders_of_photographs_and_pickapic_files_train(tiny_sd: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folders"
    for side, box in (("w", (0, 0, 64, 64)), ("l", (100, 100, 120, 140))):
        (folder / side).mkdir(parents=True)
        for name in ("astronaut", "coffee"):
            (folder / side / f"{name}.png").write_bytes(photo(name, box))
    for name in ("astronaut", "coffee"):
        (folder / f"{name}.txt").write_text(f"a photo of {name}")
        (folder / "w" / f"{name}.txt").write_text(f"a photo of {name}")
    table = pa.table(
        {
            "jpg_0": [photo("chelsea"), photo("coffee")],
            "jpg_1": [photo("astronaut"), photo("astronaut")],
            "label_0": [1.0, 0.0],
            "label_1": [0.0, 1.0],
            "caption": ["a cat", "a cup"],
            "has_label": [True, True],
            "are_different": [True, True],
        }
    )
    pq.write_table(table, tmp_path / "pickapic.parquet")
    for source in (folder, tmp_path / "pickapic.parquet"):
        assert (
            len(train("diffusion-dpo", tiny_sd, source, tmp_path / source.stem, max_steps=2)) == 2
        )


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("consistency-dpo", {}, "is of family sd"),
        ("consistency-dpo", {"num_draws": 2}, "num_draws"),
        ("diffusion-kto", {"split_pair_backward": True}, "couples"),
        ("dro", {"split_pair_backward": True}, "split_pair_backward"),
        ("diffusion-dpo", {"min_timestep": 600, "max_timestep": 500}, "min_timestep"),
        ("diffusion-dpo", {"max_timestep": 1000}, "999"),
        ("diffusion-dpo", {"num_draws": 1, "reference_update": "ema"}, "num_draws"),
    ],
)
def test_contradicting_options_are_refused(
    method: str,
    change: dict[str, Any],
    message: str,
    tiny_sd: Path,
    pairs: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match=message):
        train(method, tiny_sd, pairs, tmp_path, **change)


def test_cached_reference_errors_of_other_options_are_dropped(
    tiny_sd: Path, pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    settings: dict[str, Any] = {"num_draws": 1, "save_steps": 2}
    train("diffusion-dpo", tiny_sd, pairs, tmp_path, max_steps=2, max_timestep=50, **settings)
    more = settings | {"max_steps": 3, "resume_from_checkpoint": "latest"}
    train("diffusion-dpo", tiny_sd, pairs, tmp_path, max_timestep=50, **more)
    assert "computed again" not in caplog.text
    more["max_steps"] = 4
    train("diffusion-dpo", tiny_sd, pairs, tmp_path, min_timestep=900, **more)
    assert "computed again" in caplog.text
