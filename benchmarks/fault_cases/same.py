"""Rows 15 to 17: determinism, LoRA round trips, invariants."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from .harness import Tally, case, from_tests, mmalign
from .toys import CONSISTENCY, METHODS, OFFLINE, STEPS, TOYS, difference, weights

OTHERS = tuple(method for method in METHODS if method != "online-dpo")


def run(argv: list[str]) -> None:
    """Run a command that has to succeed."""
    said = mmalign(*argv)
    assert said.code == 0, said.error


def metrics(output: Path) -> list[dict[str, Any]]:
    """Read the log of a run."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def repeatable(method: str, folder: Path, tally: Tally) -> None:
    """Run twice with a seed, once with another, and with workers."""
    first = folder / "first"
    run(TOYS.train(method, first))
    run(TOYS.train(method, folder / "second"))
    problem = difference(first, folder / "second")
    tally.point(not problem, f"same seed: {problem}")
    run(TOYS.train(method, folder / "other", "--seed=1"))
    tally.point(bool(difference(first, folder / "other")), "another seed gives the same")
    if method in OFFLINE:
        run(TOYS.train(method, folder / "workers", "--num_workers=2", "--max_steps=4"))
        run(TOYS.train(method, folder / "none", "--max_steps=4"))
        problem = difference(folder / "none", folder / "workers")
        tally.point(not problem, f"workers: {problem}")
    tally.answers = ["bitwise"]


def accumulated(method: str, folder: Path, tally: Tally) -> None:
    """A step of 4 x 1 and of 2 x 2 samples is the same up to rounding."""
    small = ("--learning_rate=0.0001", "--max_steps=3", "--beta=1", "--max_grad_norm=0")
    options = small if method not in ("draft", "rocm", "dro") else (*small[:2], small[3])
    if method == "curriculum-dpo":
        options = (*options, "--curriculum.num_buckets=1")
    one = ("--per_device_train_batch_size=4", "--gradient_accumulation_steps=1")
    two = ("--per_device_train_batch_size=2", "--gradient_accumulation_steps=2")
    run(TOYS.train(method, folder / "one", *options, *one))
    run(TOYS.train(method, folder / "two", *options, *two))
    pairs = zip(metrics(folder / "one"), metrics(folder / "two"), strict=True)
    for a, b in pairs:
        ok = math.isclose(a["loss"], b["loss"], rel_tol=1e-4, abs_tol=1e-5)
        ok &= math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-2, abs_tol=1e-7)
        tally.point(ok, f"loss {a['loss']} {b['loss']}, norm {a['grad_norm']} {b['grad_norm']}")
    tally.answers = ["loss within 1e-4, gradient norm within 1 %"]


for _method in METHODS:
    case(15, f"{_method}: same seed, another seed, workers", "bitwise; another seed differs")(
        partial(repeatable, _method)
    )
for _method in ("diffusion-dpo", "consistency-dpo", "curriculum-dpo", "mapo", "dro", "vlm-dpo"):
    case(15, f"{_method}: 4 x 1 = 2 x 2", "equal within rounding")(partial(accumulated, _method))

CONVOLUTIONS = '--lora.targets=["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]'
LANGUAGE = '--lora.targets=["q_proj", "v_proj", "up_proj"]'


def round_trip(method: str, folder: Path, tally: Tally) -> None:
    """Load what a method trained into a fresh plain pipeline: no pixel differs."""
    vlm = method == "vlm-dpo"
    for number, (targets, alpha) in enumerate(
        (t, a) for t in ([], [LANGUAGE if vlm else CONVOLUTIONS]) for a in (2, 5)
    ):
        output = folder / str(number)
        argv = TOYS.train(method, output, "--max_steps=2", *targets, f"--lora.alpha={alpha}")
        run(argv)
        distance = _vlm_distance(output) if vlm else _distance(method, output)
        same, moved = distance
        tally.point(same == 0 and moved > 0, f"differs by {same}, moved by {moved}")
    tally.answers = ["max difference 0.0; the base differs"]


def _distance(method: str, output: Path) -> tuple[float, float]:
    """Compare images of plain diffusers with those of the trained policy, and of the base."""
    from diffusers import LatentConsistencyModelPipeline, StableDiffusionPipeline

    from mmalign.adapters import load_adapter
    from mmalign.config import LoraConfig, ModelConfig, SamplingConfig
    from mmalign.lora import attach_lora

    consistent = method in CONSISTENCY
    model = TOYS.lcm if consistent else TOYS.sd
    sampling = SamplingConfig(num_inference_steps=3, guidance_scale=4.0)
    adapter = load_adapter(ModelConfig(model=str(model)), device="cpu")
    attach_lora(adapter.denoiser, LoraConfig(**_lora_options(output)), seed=0)
    _take_weights(adapter.denoiser, output)
    trained = adapter.sample(["a red"], [7], sampling)
    kind: Any = LatentConsistencyModelPipeline if consistent else StableDiffusionPipeline
    images = []
    for loaded in (True, False):
        pipeline = kind.from_pretrained(model, use_safetensors=True)
        if loaded:
            pipeline.load_lora_weights(output / "adapter")
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(7)
        settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "pt"}
        images.append(pipeline("a red", generator=generator, **settings).images)
    return float((images[0] - trained).abs().max()), float((images[0] - images[1]).abs().max())


def _vlm_distance(output: Path) -> tuple[float, float]:
    """Compare logits of plain peft with those of the trained policy, and of the base."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    from mmalign.adapters import load_vlm
    from mmalign.config import VlmLoraConfig, VlmModelConfig
    from mmalign.vlm_lora import attach_vlm_lora

    def logits(network: Any) -> torch.Tensor:
        network.eval()
        with torch.no_grad():
            result: torch.Tensor = network(input_ids=torch.arange(5, 25)[None]).logits
        return result

    kind: Any = AutoModelForImageTextToText
    base = logits(kind.from_pretrained(TOYS.llava))
    network: Any = PeftModel.from_pretrained(
        kind.from_pretrained(TOYS.llava), str(output / "adapter")
    )
    plain = logits(network)
    adapter: Any = load_vlm(VlmModelConfig(model=str(TOYS.llava), offline=True), "cpu")
    attach_vlm_lora(adapter.model, VlmLoraConfig(**_lora_options(output)), seed=0)
    _take_weights(adapter.policy, output)
    trained = logits(adapter.model)
    return float((plain - trained).abs().max()), float((plain - base).abs().max())


def _lora_options(output: Path) -> dict[str, Any]:
    """Read how a run attached its LoRA."""
    options: dict[str, Any] = yaml.safe_load((output / "config.yaml").read_text())["lora"]
    return {**options, "init_from": None}


def _take_weights(network: torch.nn.Module, output: Path) -> None:
    """Put in what the run's last checkpoint holds: the weights as they were trained."""
    from mmalign.checkpoint import latest_checkpoint, load_checkpoint

    path = latest_checkpoint(output / "checkpoints")
    assert path is not None
    kept = load_checkpoint(path).tensors["model"]
    parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}
    assert parameters.keys() == kept.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(kept[name])


for _method in METHODS:
    case(16, f"{_method}: attention, and convolutions or MLP; alpha = r, and not", "max 0.0")(
        partial(round_trip, _method)
    )
from_tests(
    16,
    "kohya export reloads, hostile files are refused",
    "as exact",
    "tests/test_lora.py",
    "tests/test_lora_export.py",
    "tests/test_lora_files.py",
)


def starts_at_the_reference(method: str, folder: Path, tally: Tally) -> None:
    """Step 1 has loss ln 2 and no margin; what was logged later has moved."""
    run(TOYS.train(method, folder / "run"))
    lines = metrics(folder / "run")
    first, last = lines[0], lines[-1]
    # Language models score the reference's answers in other batches, which moves the last bits.
    slack = 1e-5 if method == "vlm-dpo" else 0.0
    tally.point(abs(first["loss"] - math.log(2)) <= max(slack, 1e-6), f"loss {first['loss']}")
    margin = first.get("rewards/margin", first.get("margin"))
    tally.point(margin is not None and abs(margin) <= slack, f"margin {margin}")
    tally.point(last["loss"] != first["loss"], "nothing moved")
    tally.answers = [f"loss ln 2, margin {f'within {slack:g} of' if slack else 'exactly'} 0"]


for _method in (
    "diffusion-dpo",
    "consistency-dpo",
    "curriculum-dpo",
    "d3po",
    "tailorpo",
    "vlm-dpo",
):
    case(17, f"{_method} starts at the reference", "ln 2, margin 0")(
        partial(starts_at_the_reference, _method)
    )


def keeps_the_base(method: str, folder: Path, tally: Tally) -> None:
    """Training, and a resume in the middle, leave every file of the model as it was."""
    model = TOYS.llava if method == "vlm-dpo" else TOYS.lcm if method in CONSISTENCY else TOYS.sd
    before = {file: file.read_bytes() for file in model.rglob("*") if file.is_file()}
    output = folder / "run"
    run(TOYS.train(method, output, f"--max_steps={STEPS // 2}"))
    run(TOYS.train(method, output))
    after = {file: file.read_bytes() for file in model.rglob("*") if file.is_file()}
    tally.point(before == after, "files of the model have changed")
    zero = all(bool((v == 0).all()) for k, v in weights(output).items() if "lora_B" in k)
    tally.point(not zero, "nothing was learnt")
    tally.answers = ["unchanged after training and after a resume"]


for _method in OTHERS:
    case(17, f"{_method} leaves the model's files alone", "unchanged, also after a resume")(
        partial(keeps_the_base, _method)
    )
from_tests(
    17,
    "adapter off is the base; reference unchanged after steps and resume; ratio 1",
    "exact",
    "tests/test_reference.py",
    "tests/pipelines/test_offline_methods.py",
    "tests/pipelines/test_online_methods.py",
    limit=600,
)
from_tests(
    17,
    "chosen and rejected share noise, timestep and caption dropout",
    "exact",
    "tests/data/test_batch.py",
)
