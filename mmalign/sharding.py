"""Layers of a large model divided among processes, by PyTorch's FSDP2 or DeepSpeed's ZeRO-3.

`accelerate launch` with a configuration of type FSDP or DEEPSPEED asks for it. Layers are put
together while they run; everything else of the model is on every process. So any way into the model
works, as long as all processes take the same ways equally often. FSDP2 divides what is trained as
well; for DeepSpeed see `mmalign.zero`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mmalign import zero
from mmalign.processes import world_size

FSDP = "ACCELERATE_USE_FSDP"
REQUESTS = (FSDP, zero.REQUEST)


def requested() -> bool:
    """Tell whether the launcher asks for divided weights."""
    asked = zero.requested() or os.environ.get(FSDP, "").lower() == "true"
    return world_size() > 1 and asked


def checkpointing() -> dict[str, Any]:
    """Return the options of `torch.utils.checkpoint` that suit the weights."""
    options: dict[str, Any] = {"use_reentrant": False}
    if zero.requested():
        # It compares shapes of what was saved, and a layer that was put away again has none.
        options["determinism_check"] = "none"
    return options


def shard_layers(layers: Iterable[nn.Module], device: torch.device) -> None:
    """Divide the weights of each layer among the processes, in place.

    Raises:
        InputError: DeepSpeed is asked for, and nothing is frozen.
    """
    if zero.requested():
        zero.divide(layers, device)
        return
    for layer in layers:
        fully_shard(layer, mesh=_mesh(device.type), reshard_after_forward=True)


def place_rest(model: nn.Module, device: torch.device) -> None:
    """Put what is not divided on the device; the layers are there already, each with its part."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor) and not zero.is_divided(tensor):
            tensor.data = tensor.data.to(device)


def unwrapped(module: nn.Module) -> nn.Module:
    """Take the network out of what averages its gradients among processes or devices.

    Accelerate's function of this kind imports DeepSpeed wherever it is installed, which takes
    seconds and prints to standard output.
    """
    wrappers = (DistributedDataParallel, nn.DataParallel)
    inner: nn.Module = module.module if isinstance(module, wrappers) else module
    return inner


def full(value: Tensor) -> Tensor:
    """Put a divided tensor together, on all processes at once; others stay as they are."""
    if not isinstance(value, DTensor):
        return value
    whole: Tensor = value.full_tensor()
    return whole


def own_part(value: Tensor) -> Tensor:
    """Take this process's part of a divided tensor, without gradient; others are whole."""
    part: Tensor = value.detach()
    return part.to_local() if isinstance(part, DTensor) else part


def divided_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Divide a whole tensor as a parameter is, if it is; scalars stay as they are."""
    if not isinstance(parameter, DTensor) or value.ndim == 0:
        return value
    on_device = value.to(parameter.device)
    return distribute_tensor(on_device, parameter.device_mesh, parameter.placements)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Average the gradients of what is not divided, and scale all to a norm of at most `max_norm`.

    Returns:
        Their norm before.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    for gradient in gradients:
        if not isinstance(gradient, DTensor):
            dist.all_reduce(gradient)
            gradient /= world_size()
    squares = [full(gradient.float().square().sum()) for gradient in gradients]
    norm = torch.stack(squares).sum().sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.item())
    return norm


@cache
def _mesh(device_type: str) -> DeviceMesh:
    return init_device_mesh(device_type, (world_size(),))
