"""The reference model: the policy with its adapter off, or a frozen copy.

A LoRA leaves the weights below it untouched, so the reference is the same network without it and
costs no memory. A reference that moves with the policy is a second adapter on the same weights.
Only full fine-tuning needs a copy of the network.
"""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmalign.config import LoraConfig, ReferenceConfig
from mmalign.sharding import unwrapped
from mmalign.types import ImageAdapter, InputError, VlmAdapter

POLICY_NAME = "default"
REFERENCE_NAME = "reference"


class Reference(ABC):
    """The frozen or slowly moving model that the policy is compared with."""

    def __init__(self, config: ReferenceConfig, tracked: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Remember (reference, policy) tensors by name; use `make_reference`."""
        self._config = config
        self._tracked = tracked
        self._is_active = False

    @property
    def network(self) -> nn.Module | None:
        """The network that the reference has of its own, if it has one."""
        return None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make the adapter run the reference inside the block.

        The policy, with its `requires_grad` flags, is back afterwards, also after an error.
        Gradients are the caller's business: use `torch.no_grad()` beside it.
        """
        if self._is_active:
            raise RuntimeError("the reference is already active")
        self._is_active = True
        try:
            with self._switched():
                yield
        finally:
            self._is_active = False

    @abstractmethod
    def _switched(self) -> AbstractContextManager[None]:
        """Return a context in which the adapter runs the reference."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the reference after optimizer step `step` (the first is 1), as configured.

        `ema`: reference = decay * reference + (1 - decay) * policy, on the trained tensors (for a
        LoRA on A and B, not on their product). `copy`: reference = policy every
        `reference_update_steps` steps. `never`: nothing.
        """
        rule = self._config.reference_update
        if rule == "ema":
            for reference, policy in self._tracked.values():
                reference.lerp_(policy, 1 - self._config.reference_decay)
        elif rule == "copy" and step % self._config.reference_update_steps == 0:
            for reference, policy in self._tracked.values():
                reference.copy_(policy)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of a moving reference, nothing for one that never moves."""
        if self._config.reference_update == "never":
            return {}
        return {name: reference.detach() for name, (reference, _) in self._tracked.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: it belongs to another reference.
        """
        if set(state) != set(self.state_dict()):
            raise ValueError("the saved reference has other tensors than this one")
        for name, value in state.items():
            self._tracked[name][0].copy_(value)


class _AdapterReference(Reference):
    """The network with the policy's LoRA off, or with another one in its place."""

    def __init__(self, network: nn.Module, config: ReferenceConfig) -> None:
        self._moves = config.reference_update != "never"
        if self._moves:
            _add_reference_lora(network)
        self._layers = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
        super().__init__(config, _lora_tensors(network) if self._moves else {})

    @contextmanager
    def _switched(self) -> Iterator[None]:
        # PEFT's switches also set `requires_grad` of every LoRA in the layer.
        flags = [(p, p.requires_grad) for layer in self._layers for p in layer.parameters()]
        try:
            for layer in self._layers:
                if self._moves:
                    layer.set_adapter(REFERENCE_NAME)
                else:
                    layer.enable_adapters(False)
            for parameter, flag in flags:
                # FSDP2 copies the flag when a layer is first put together, and never again.
                parameter.requires_grad_(flag and isinstance(parameter, DTensor))
            yield
        finally:
            for layer in self._layers:
                layer.set_adapter(POLICY_NAME)
                layer.enable_adapters(True)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


class _CopyReference(Reference):
    """A frozen copy of the trained parts of the network, for full fine-tuning."""

    def __init__(
        self, adapter: object, attribute: str, network: nn.Module, config: ReferenceConfig
    ) -> None:
        self._adapter, self._attribute = adapter, attribute
        # What is frozen stays as it is, so both may use it.
        shared = {id(p): p for p in network.parameters() if not p.requires_grad}
        self._copy = copy.deepcopy(network, dict(shared)).eval().requires_grad_(False)
        policy = dict(network.named_parameters())
        frozen = self._copy.named_parameters()
        tracked: dict[str, tuple[Tensor, Tensor]] = {
            name: (value, policy[name]) for name, value in frozen if value is not policy[name]
        }
        super().__init__(config, tracked)

    @property
    def network(self) -> nn.Module:
        """The frozen copy."""
        return self._copy

    @contextmanager
    def _switched(self) -> Iterator[None]:
        policy = getattr(self._adapter, self._attribute)
        setattr(self._adapter, self._attribute, self._copy)
        try:
            yield
        finally:
            setattr(self._adapter, self._attribute, policy)


def make_reference(
    adapter: ImageAdapter | VlmAdapter,
    lora: LoraConfig,
    config: ReferenceConfig,
    *,
    attribute: str = "denoiser",
) -> Reference:
    """Make the reference of `adapter`: equal to the policy as it is now, for an untrained LoRA.

    Call it after `attach_lora` and before the first step.

    Args:
        adapter: the model.
        lora: what is trained.
        config: whether the reference moves.
        attribute: where the adapter has the network that is trained.

    Raises:
        InputError: the options of a moving reference are out of range.
    """
    if not 0 <= config.reference_decay <= 1:
        raise InputError(f"reference_decay: must be in [0, 1], got {config.reference_decay}")
    if config.reference_update_steps < 1:
        steps = config.reference_update_steps
        raise InputError(f"reference_update_steps: must be at least 1, got {steps}")
    network = unwrapped(getattr(adapter, attribute))
    if not lora.enabled:
        return _CopyReference(adapter, attribute, network, config)
    carriers = [m for m in network.modules() if POLICY_NAME in getattr(m, "peft_config", {})]
    if not carriers:
        raise ValueError("attach a LoRA before making its reference")
    return _AdapterReference(carriers[0], config)


def _add_reference_lora(denoiser: nn.Module) -> None:
    """Add a second LoRA equal to the policy's, frozen and not in use."""
    model = cast(Any, denoiser)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        model.add_adapter(
            copy.deepcopy(model.peft_config[POLICY_NAME]), adapter_name=REFERENCE_NAME
        )
    model.set_adapter(POLICY_NAME)
    for reference, policy in _lora_tensors(denoiser).values():
        reference.data = policy.detach().clone()
        reference.requires_grad_(False)


def _lora_tensors(denoiser: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    named = dict(denoiser.named_parameters())
    return {
        name: (value, named[name.replace(f".{REFERENCE_NAME}.", f".{POLICY_NAME}.")])
        for name, value in named.items()
        if f".{REFERENCE_NAME}." in name
    }
