"""The reference is the base, the policy comes back, and a moving reference moves as told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.adapters import DiffusersAdapter, load_adapter
from mmalign.config import LoraConfig, ModelConfig, ReferenceConfig
from mmalign.lora import attach_lora, save_lora
from mmalign.reference import Reference, make_reference
from mmalign.types import InputError

LORA = LoraConfig(rank=2, alpha=5, targets=["to_q", "to_v", "conv1"])
FULL = LoraConfig(enabled=False)


def load(folder: Path) -> DiffusersAdapter:
    return load_adapter(ModelConfig(model=str(folder)), device="cpu")


def prepare(folder: Path, lora: LoraConfig, **options: Any) -> tuple[DiffusersAdapter, Reference]:
    adapter = load(folder)
    if lora.enabled:
        attach_lora(adapter.denoiser, lora, seed=0)
    else:
        adapter.denoiser.requires_grad_(True)
    return adapter, make_reference(adapter, lora, ReferenceConfig(**options))


@torch.no_grad()
def predict(adapter: DiffusersAdapter) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    condition = adapter.encode_condition(["red cat", "a dog"], height=16, width=16)
    return adapter.predict(latents, torch.tensor([10, 900]), condition)


@torch.no_grad()
def train(adapter: DiffusersAdapter, seed: int = 1) -> None:
    """Change what is trained, visibly."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.denoiser.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def flags(adapter: DiffusersAdapter) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in adapter.denoiser.named_parameters()}


def run_reference(adapter: DiffusersAdapter, reference: Reference) -> Tensor:
    with reference.active():
        return predict(adapter)


@pytest.mark.parametrize("update", ["never", "ema", "copy"])
@pytest.mark.parametrize("lora", [LORA, FULL], ids=["lora", "full"])
def test_reference_is_the_base_and_the_policy_comes_back(
    tiny_sd: Path, lora: LoraConfig, update: str
) -> None:
    base = predict(load(tiny_sd))
    adapter, reference = prepare(tiny_sd, lora, reference_update=update)
    assert torch.equal(run_reference(adapter, reference), predict(adapter))
    train(adapter)
    policy, before, denoiser = predict(adapter), flags(adapter), adapter.denoiser
    assert (policy - base).abs().max() > 1e-3
    assert torch.equal(run_reference(adapter, reference), base)
    assert torch.equal(predict(adapter), policy)
    with pytest.raises(KeyError), reference.active():
        raise KeyError
    assert torch.equal(predict(adapter), policy)
    assert flags(adapter) == before
    assert adapter.denoiser is denoiser
    assert any(before.values())


def test_nothing_is_trainable_inside(tiny_sd: Path) -> None:
    adapter, reference = prepare(tiny_sd, LORA, reference_update="ema")
    with reference.active():
        assert not any(flags(adapter).values())
    assert all(
        ("default" in name) == flag for name, flag in flags(adapter).items() if "lora" in name
    )


@pytest.mark.parametrize("update", ["never", "copy"])
def test_a_lora_frozen_in_part_stays_so(tiny_sd: Path, update: str) -> None:
    adapter, reference = prepare(tiny_sd, LORA, reference_update=update)
    next(p for p in adapter.denoiser.parameters() if p.requires_grad).requires_grad_(False)
    before = flags(adapter)
    run_reference(adapter, reference)
    assert flags(adapter) == before


def test_gradients_of_the_policy_do_not_notice(tiny_sd: Path) -> None:
    gradients = []
    for uses_reference in (False, True):
        adapter, reference = prepare(tiny_sd, LORA)
        train(adapter)
        condition = adapter.encode_condition(["x"], height=16, width=16)
        output = adapter.predict(torch.ones(1, 4, 8, 8), torch.tensor([5]), condition)
        if uses_reference:
            run_reference(adapter, reference)
        output.square().sum().backward()
        gradients.append([p.grad for p in adapter.denoiser.parameters() if p.requires_grad])
    for first, second in zip(*gradients, strict=True):
        assert first is not None
        assert second is not None
        assert torch.equal(first, second)


def test_wrapped_denoiser(tiny_sd: Path) -> None:
    base = predict(load(tiny_sd))
    for lora in (LORA, FULL):
        adapter, reference = prepare(tiny_sd, lora)
        train(adapter)
        wrapper = torch.nn.DataParallel(adapter.denoiser)
        adapter.denoiser = wrapper
        assert torch.equal(run_reference(adapter, reference), base)
        assert adapter.denoiser is wrapper


def test_blocks_do_not_nest(tiny_sd: Path) -> None:
    adapter, reference = prepare(tiny_sd, LORA)
    with reference.active(), pytest.raises(RuntimeError, match="already active"):
        run_reference(adapter, reference)
    train(adapter)
    assert (predict(adapter) - run_reference(adapter, reference)).abs().max() > 1e-3


@pytest.mark.parametrize("lora", [LORA, FULL], ids=["lora", "full"])
def test_copy_every_two_steps(tiny_sd: Path, lora: LoraConfig) -> None:
    adapter, reference = prepare(tiny_sd, lora, reference_update="copy", reference_update_steps=2)
    base = predict(adapter)
    train(adapter)
    policy = predict(adapter)
    reference.update(1)
    assert torch.equal(run_reference(adapter, reference), base)
    reference.update(2)
    assert torch.equal(run_reference(adapter, reference), policy)
    train(adapter, seed=2)
    reference.update(3)
    assert torch.equal(run_reference(adapter, reference), policy)


@pytest.mark.parametrize("lora", [LORA, FULL], ids=["lora", "full"])
def test_moving_average(tiny_sd: Path, lora: LoraConfig) -> None:
    adapter, reference = prepare(tiny_sd, lora, reference_update="ema", reference_decay=0.75)
    start = {name: value.clone() for name, value in reference.state_dict().items()}
    train(adapter)
    policy = dict(adapter.denoiser.named_parameters())
    reference.update(1)
    assert start
    for name, value in reference.state_dict().items():
        trained = policy[name.replace(".reference.", ".default.")]
        torch.testing.assert_close(value, 0.75 * start[name] + 0.25 * trained)


@pytest.mark.parametrize("lora", [LORA, FULL], ids=["lora", "full"])
def test_state_round_trip(tiny_sd: Path, lora: LoraConfig) -> None:
    adapter, reference = prepare(tiny_sd, lora, reference_update="ema", reference_decay=0.5)
    train(adapter)
    reference.update(1)
    state = {name: value.clone() for name, value in reference.state_dict().items()}
    moved = run_reference(adapter, reference)
    other_adapter, other = prepare(tiny_sd, lora, reference_update="ema")
    assert not torch.equal(run_reference(other_adapter, other), moved)
    other.load_state_dict(state)
    assert torch.equal(run_reference(other_adapter, other), moved)
    state.popitem()
    with pytest.raises(ValueError, match="other tensors"):
        other.load_state_dict(state)


def test_a_fixed_reference_has_no_state(tiny_sd: Path) -> None:
    adapter, reference = prepare(tiny_sd, LORA)
    base = run_reference(adapter, reference)
    train(adapter)
    reference.update(1)
    assert reference.state_dict() == {}
    reference.load_state_dict({})
    assert torch.equal(run_reference(adapter, reference), base)


def test_the_second_adapter_is_not_saved(tiny_sd: Path, tmp_path: Path) -> None:
    adapter, _ = prepare(tiny_sd, LORA, reference_update="ema")
    train(adapter)
    policy = predict(adapter)
    save_lora(adapter.denoiser, tmp_path)
    config = ModelConfig(model=str(tiny_sd), adapter=str(tmp_path))
    assert torch.equal(predict(load_adapter(config, device="cpu", for_training=False)), policy)


def test_unusable_options(tiny_sd: Path) -> None:
    with pytest.raises(InputError, match="reference_decay"):
        prepare(tiny_sd, LORA, reference_decay=1.5)
    with pytest.raises(InputError, match="reference_update_steps"):
        prepare(tiny_sd, LORA, reference_update_steps=0)
    with pytest.raises(ValueError, match="attach a LoRA"):
        make_reference(load(tiny_sd), LORA, ReferenceConfig())
