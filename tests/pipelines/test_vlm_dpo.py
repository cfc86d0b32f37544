"""Training of tiny vision-language models from pairs of answers, with its invariants."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from skimage import data as photographs
from transformers import AutoModelForImageTextToText

from mmalign.adapters import load_vlm
from mmalign.adapters._vlm import VlmFamily
from mmalign.config import (
    GenerationConfig,
    VlmDpoConfig,
    VlmLoraConfig,
    VlmModelConfig,
    VlmPairsConfig,
)
from mmalign.data.files import write_jsonl
from mmalign.objectives.vlm_presets import PRESETS
from mmalign.pipelines import vlm_dpo
from mmalign.types import ImageInputs, InputError

SHAPES_CLIP = "pkg://mmalign.shapes/models/clip"
FAMILIES = ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pairs on each of three real photographs."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for index, name in enumerate(["astronaut", "coffee", "chelsea"]):
        photo = Image.fromarray(getattr(photographs, name)()).convert("RGB")
        photo.crop((50, 50, 250, 250)).resize((60, 40)).save(folder / f"{name}.png")
        for prompt, chosen in (("What is in the picture?", "A red circle"), ("Describe", "Yes")):
            rows.append(
                {
                    "image": f"{name}.png",
                    "prompt": f"<image>\n{prompt}",
                    "chosen": f"{chosen} {index} and one.",
                    "rejected": f"No blue square {index}.",
                    "revised": f"A blue circle {index}.",
                    "score_chosen": 0.5 + index,
                    "score_rejected": 0.25,
                }
            )
    write_jsonl(folder / "pairs.jsonl", rows)
    return folder / "pairs.jsonl"


def options(model: Path, pairs: Path, output: Path, **more: Any) -> VlmDpoConfig:
    values: dict[str, Any] = {
        "model": str(model),
        "output_dir": str(output),
        "device": "cpu",
        "offline": True,
        "lora": VlmLoraConfig(rank=2, alpha=4),
        "pairs": VlmPairsConfig(path=str(pairs)),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
    }
    return VlmDpoConfig(**{**values, **more})


def train(model: Path, pairs: Path, output: Path, **more: Any) -> list[dict[str, Any]]:
    vlm_dpo.run(options(model, pairs, output, **more))
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def trained(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("name", FAMILIES)
def test_first_step_is_at_the_reference(
    name: str, vlm: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    model = vlm(name)
    before = load_file(model / "model.safetensors")
    lines = train(model, pairs, tmp_path)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[0]["rewards/margin"] == pytest.approx(0, abs=1e-5)
    assert abs(lines[-1]["loss"] - math.log(2)) > 1e-3
    after = load_file(model / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    names = trained(tmp_path)
    assert all(".language_model." in key for key in names)
    targets = {key.split(".lora_")[0].rpartition(".")[2] for key in names}
    assert targets == set(VlmLoraConfig().targets)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["method"] == "vlm-dpo dpo"
    assert summary["cost"]["tokens_backward"] > 0
    for file in ("config.yaml", "report.html", "README.md"):
        assert (tmp_path / file).stat().st_size > 0


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_adapter_loads_in_plain_peft(
    name: str, vlm: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    train(vlm(name), pairs, tmp_path, learning_rate=1e-2)
    config = VlmModelConfig(model=str(vlm(name)), adapter=str(tmp_path / "adapter"), offline=True)
    ours = load_vlm(config, "cpu")
    text = ours.chat.text("What is it?", 1)
    image = Image.open(pairs.parent / "coffee.png").convert("RGB")
    inputs = ours.chat.processor(text=[text], images=[image], return_tensors="pt")
    base = AutoModelForImageTextToText.from_pretrained(vlm(name)).eval()
    with torch.no_grad():
        plain = base(**inputs).logits
        peft = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(**inputs).logits
        loaded = ours.model(**inputs).logits
        folded = load_vlm(config, "cpu", for_training=True).model(**inputs).logits
    assert torch.equal(peft, loaded)
    assert (peft - plain).abs().max() > 1e-2
    torch.testing.assert_close(folded, peft, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"share_prefix": False},
        {"cache_reference": False},
        {"gradient_checkpointing": True},
        {"image_cache_mib": 0},
        {"logits_chunk": 3},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_cheaper_ways_train_the_same(
    name: str, change: dict[str, Any], vlm: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    plain = train(vlm(name), pairs, tmp_path / "plain")
    other = train(vlm(name), pairs, tmp_path / "other", **change)
    for a, b in zip(plain, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_resumed_run_equals_the_uninterrupted_one(
    vlm: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"max_steps": 6, "save_steps": 2, "preset": "chip"}
    whole = train(vlm("llava"), pairs, tmp_path / "a", **settings)
    train(vlm("llava"), pairs, tmp_path / "b", **settings)
    latest = sorted((tmp_path / "b" / "checkpoints").iterdir())[-1]
    shutil.rmtree(latest)  # as if the run had been killed after step 4
    shutil.rmtree(tmp_path / "b" / "cache")  # and its cache lost with it
    resumed = train(
        vlm("llava"), pairs, tmp_path / "b", resume_from_checkpoint="latest", **settings
    )
    assert resumed == whole
    first, second = trained(tmp_path / "a"), trained(tmp_path / "b")
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_trains(
    preset: str, vlm: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    lines = train(vlm("llava"), pairs, tmp_path, preset=preset, clip_model=SHAPES_CLIP)
    assert len(lines) == 3
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert lines[0]["loss"] != lines[-1]["loss"]


@pytest.mark.parametrize("preset", ["tars", "tars_official", "mdpo", "sympo", "povid"])
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_presets_with_variants_train_other_families(
    preset: str, name: str, vlm: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    lines = train(vlm(name), pairs, tmp_path, preset=preset, clip_model=SHAPES_CLIP, max_steps=2)
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)


def test_full_fine_tuning_moves_the_language_model_only(
    vlm: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    lines = train(vlm("llava"), pairs, tmp_path, lora=VlmLoraConfig(enabled=False))
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    before = load_file(vlm("llava") / "model.safetensors")
    after = load_file(tmp_path / "model" / "model.safetensors")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert any("layers" in key for key in moved)
    assert not any("vision_tower" in key or "projector" in key for key in moved)
    assert load_vlm(VlmModelConfig(model=str(tmp_path / "model"), offline=True), "cpu").context


def test_each_image_is_encoded_once_and_prefixes_are_shared(
    vlm: Callable[[str], Path], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str | None] = []
    encode = VlmFamily.encode_images

    def counted(self: VlmFamily, images: ImageInputs) -> Any:
        encoded.append(images.key)
        return encode(self, images)

    monkeypatch.setattr(VlmFamily, "encode_images", counted)
    train(vlm("llava"), pairs, tmp_path / "a", max_steps=6)
    assert len(encoded) == 3
    assert len(set(encoded)) == 3
    train(vlm("llava"), pairs, tmp_path / "b", max_steps=6, share_prefix=False)
    shared, separate = (
        json.loads((tmp_path / name / "summary.json").read_text())["cost"]["tokens_backward"]
        for name in ("a", "b")
    )
    assert shared < 0.8 * separate


@pytest.fixture
def another_precision() -> Iterator[None]:
    """Let a test use a precision that the process has not used before."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def test_pairs_of_one_image_share_it(
    vlm: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    lines = {}
    for name, more in {
        "grouped": {"group_images": True},
        "separate": {"group_images": True, "share_prefix": False},
    }.items():
        lines[name] = train(vlm("qwen2_vl"), pairs, tmp_path / name, max_steps=5, **more)
    for a, b in zip(lines["grouped"], lines["separate"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    costs = [
        json.loads((tmp_path / name / "summary.json").read_text())["cost"]["tokens_backward"]
        for name in lines
    ]
    assert costs[0] < 0.6 * costs[1]


@pytest.mark.usefixtures("another_precision")
def test_half_precision_starts_at_the_reference(
    vlm: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    lines = train(
        vlm("llava"), pairs, tmp_path, dtype="bfloat16", mixed_precision="bf16", max_steps=2
    )
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=0.05)
    assert all(tensor.dtype == torch.float32 for tensor in trained(tmp_path).values())


def test_moving_reference_is_not_cached(
    vlm: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"reference_update": "copy", "reference_update_steps": 1}
    lines = train(vlm("llava"), pairs, tmp_path, **settings)
    assert all(line["loss"] == pytest.approx(math.log(2), abs=1e-5) for line in lines)
    assert not (tmp_path / "cache").exists()


def test_held_out_pairs_are_measured_and_answered(
    vlm: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    train(
        vlm("llava"),
        pairs,
        tmp_path,
        max_steps=12,
        eval_pairs=VlmPairsConfig(path=str(pairs)),
        generation=GenerationConfig(max_new_tokens=4),
        num_answers=2,
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["after"]["logp_margin"] > summary["before"]["logp_margin"]
    page = (tmp_path / "report.html").read_text()
    assert page.count("<article") == 2
    assert "What is in the picture?" in page


def test_cache_is_shared_by_runs(vlm: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    cache = {"cache_dir": str(tmp_path / "cache")}
    first = train(vlm("llava"), pairs, tmp_path / "a", **cache)
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    second = train(vlm("llava"), pairs, tmp_path / "b", learning_rate=1e-4, **cache)
    assert sorted((tmp_path / "cache").rglob("*.safetensors")) == files
    assert first[0]["loss"] == second[0]["loss"]


@pytest.mark.usefixtures("another_precision")
def test_cache_is_not_shared_across_precisions(
    vlm: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    full = VlmLoraConfig(enabled=False)
    runs: list[dict[str, Any]] = [
        {"mixed_precision": "bf16"},
        {"mixed_precision": "no"},
        {"mixed_precision": "no", "dtype": "bfloat16"},
        {"mixed_precision": "no", "dtype": "bfloat16", "lora": full},
    ]
    for index, more in enumerate(runs):
        AcceleratorState._reset_state()
        cache = str(tmp_path / "cache")
        train(vlm("llava"), pairs, tmp_path / str(index), cache_dir=cache, max_steps=1, **more)
        assert len(list((tmp_path / "cache").iterdir())) == index + 1


def test_too_long_rows_are_dropped_and_counted(
    vlm: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    rows[0]["prompt"] = "What? " * 200
    rows[1]["chosen"] = "A circle. " * 100
    rows[2]["image"] = "absent.png"
    write_jsonl(pairs.parent / "long.jsonl", rows)
    source = VlmPairsConfig(path=str(pairs.parent / "long.jsonl"), on_bad_row="skip")
    vlm_dpo.run(replace(options(vlm("llava"), pairs, tmp_path), pairs=source))
    page = (tmp_path / "report.html").read_text()
    assert "1 bad rows skipped, among them: " in page
    assert re.search(r"long.jsonl line 3: \S*absent.png does not exist", page)
    assert "1 pairs dropped, too long for the context" in page
    assert "1 pairs with an answer that was shortened to fit" in page


def test_errors_name_file_and_row(vlm: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name in ("astronaut", "coffee", "chelsea"):
        shutil.copy(pairs.parent / f"{name}.png", folder)
    data = (folder / "coffee.png").read_bytes()
    (folder / "broken.png").write_bytes(data[: len(data) // 2])
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"image": "broken.png"}, {}, r"^\S*jsonl line 2: broken.png: .*cannot be decoded"),
        ({"prompt": "What is <|x|></s> it?"}, {}, "line 2: the question has control tokens"),
        ({"revised": None}, {"preset": "opa"}, "line 2: 'revised' is missing"),
        ({"image": None, "prompt": "What?"}, {"preset": "mdpo"}, "line 2: has no images"),
        (
            {"prompt": ".", "image": "coffee.png"},
            {"preset": "tars", "clip_model": SHAPES_CLIP},
            "line 2: .* tokens may be perturbed",
        ),
        ({}, {"preset": "tars"}, "clip_model: preset tars"),
        ({}, {"preset": "tarz"}, "the nearest is 'tars'"),
        ({}, {"perturb_settings": {"omegas": 1}}, "the nearest is 'omega'"),
        ({}, {"weights": {"spectral": 0}}, "preset dpo has no part 'spectral'"),
        ({}, {"lora": VlmLoraConfig(targets=["q_prok"])}, "'q_prok' matches no layer"),
    ]
    for number, (change, more, problem) in enumerate(cases):
        file = folder / f"{number}.jsonl"
        write_jsonl(file, [rows[0], {**rows[1], **change}, *rows[2:]])
        with pytest.raises(InputError, match=problem) as caught:
            train(vlm("llava"), file, tmp_path / str(number), **more)
        assert "\n" not in str(caught.value)
