"""Frozen weights divided among processes by DeepSpeed's ZeRO-3.

Each frozen linear layer is put together while it runs, forward and backward, and is otherwise
spread over the processes (Rajbhandari et al., 2020, arXiv:1910.02054, stage 3). What is trained is
whole on every process, so the optimizer, accumulation and checkpoints are those of any other run,
and DeepSpeed's engine, which saves pickles, is not used.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mmalign.config import NO_DEEPSPEED, is_installed
from mmalign.processes import world_size
from mmalign.types import InputError

REQUEST = "ACCELERATE_USE_DEEPSPEED"
"""What accelerate's launcher sets to `true`; the others say how."""
STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
NOWHERE = {
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "offload_optimizer_device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "offload_param_device",
}
"""Variables that must be unset or `none`, and their names in a configuration."""


def requested() -> bool:
    """Tell whether the launcher asks for DeepSpeed."""
    return os.environ.get(REQUEST, "").lower() == "true"


def check() -> None:
    """Refuse what DeepSpeed cannot do here, before a model is loaded.

    Raises:
        InputError: it is not installed, or its configuration is for another stage or offloads.
    """
    if not is_installed("deepspeed"):
        raise InputError(NO_DEEPSPEED)
    if os.environ.get(STAGE, "3") != "3":
        raise InputError("accelerate_config: zero_stage must be 3; use ddp instead of 1 or 2")
    for variable, name in NOWHERE.items():
        if os.environ.get(variable, "none") != "none":
            raise InputError(f"accelerate_config: {name} must be none")


def divide(parts: Iterable[nn.Module], device: torch.device) -> None:
    """Divide the frozen linear layers of modules among the processes, in place and on `device`.

    Raises:
        InputError: nothing is frozen there, as in full fine-tuning.
    """
    layers = [layer for part in parts for layer in part.modules() if _divisible(layer)]
    if not layers:
        raise InputError(
            "accelerate_config: DeepSpeed divides frozen weights; train a LoRA, or use fsdp2 or ddp"
        )
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed.comm
    import deepspeed.ops
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    # No kernels of its own, which it would look for a compiler for: none is needed here.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})
    deepspeed.comm.init_distributed(auto_mpi_discovery=False, verbose=False)
    # Outside of DeepSpeed's engine its trace of the order of layers is never begun, so any order
    # and number of forwards is fine, and each layer is fetched when it runs.
    offload = DeepSpeedZeRoOffload(
        nn.ModuleList(layers),
        timers=None,
        ds_config={"train_batch_size": world_size(), "zero_optimization": {"stage": 3}},
        overlap_comm=False,
        param_persistence_threshold=0,
    )
    # DeepSpeed's own linear function, which this has put in the place of torch's, fetches weights
    # in the backward pass and lets go of them. The hooks for other layers would fetch them too, and
    # keep them if a layer ran more than once before: they count forwards by layer, not by call.
    for hook in offload.backward_hooks:
        hook.remove()


def is_divided(value: Tensor) -> bool:
    """Tell whether a parameter is in parts."""
    return hasattr(value, "ds_id")


def _divisible(layer: nn.Module) -> bool:
    """Tell a plain frozen linear layer; quantized ones are others."""
    plain = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
    return plain and not any(p.requires_grad or is_divided(p) for p in layer.parameters())
