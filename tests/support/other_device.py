"""A device for machines without a GPU: the CPU's kernels, on tensors that never mix with the CPU's.

As on a GPU, an operation on tensors of two devices is an error, except where one is a number or an
index, and values cross over only when they are copied. Whatever trains here moves all of its
tensors. Neither autocast nor the sharing of storages is imitated.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)
from torch.utils.cpp_extension import include_paths, library_paths

NAME = "elsewhere"
DEVICE = f"{NAME}:0"
aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
FACTORIES = ("arange", "arange.start", "arange.start_step", "linspace", "randperm.generator")
"""Those that resize what they fill, which a wrapped tensor cannot."""

# Autograd asks for streams and events where it runs forward passes again, and torch's guard for
# devices written in Python has none.
GUARD = r"""
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
namespace {
constexpr DeviceType kType = DeviceType::PrivateUse1;
const Device kDevice(kType, 0);
struct Guard final : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return kType; }
  Device exchangeDevice(Device) const override { return kDevice; }
  Device getDevice() const override { return kDevice; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, kDevice); }
  Stream exchangeStream(Stream) const override { return Stream(Stream::DEFAULT, kDevice); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
}
extern "C" void install() {
  static Guard guard;
  impl::device_guard_impl_registry[static_cast<size_t>(kType)].store(&guard);
}
"""


class Elsewhere(torch.Tensor):
    """A tensor on the device; `held` has its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, requires_grad: bool = False) -> Elsewhere:
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(DEVICE),
            requires_grad=requires_grad,
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: object, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return compute(func, args, kwargs or {})

    def __repr__(self, **_: object) -> str:
        return f"{type(self).__name__}({self.held!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()


class Module(_DummyBackendModule):
    """What is asked of `torch.elsewhere`."""

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def compute(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation on what the tensors hold.

    Raises:
        RuntimeError: some are on this device, and others on the CPU.
    """
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    away = [x for x in tensors if isinstance(x, Elsewhere)]
    left = [x for x in tensors if not isinstance(x, Elsewhere) and x.ndim]
    if away and left and func not in (*COPIES, *INDEXED):
        shapes = ", ".join(str(tuple(x.shape)) for x in left)
        raise RuntimeError(f"{func} expects all tensors on one device; on the CPU are {shapes}")
    held, named = tree_map(_inside, (args, kwargs))
    result = func(*held, **named)
    if func is aten.copy_.default:
        return args[0]
    target = kwargs.get("device")
    if func is aten._local_scalar_dense.default or (target is not None and target.type != NAME):
        return result
    wrapped = tree_map(lambda x: Elsewhere(x) if isinstance(x, torch.Tensor) else x, result)
    if target is not None:
        return wrapped
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def install(folder: Path) -> None:
    """Make it this process's accelerator, for good; `folder` takes what is compiled."""
    module = Module()
    _setup_privateuseone_for_python_backend(NAME, backend_module=module)
    _install_guard(folder)
    kernels = torch.library.Library("_", "IMPL")
    kernels.fallback(lambda func, *args, **kwargs: compute(func, args, kwargs), "PrivateUse1")
    own = torch.library.Library("aten", "IMPL")
    own.impl("empty.memory_format", _made_by(torch.empty), "PrivateUse1")
    own.impl("empty_strided", _made_by(torch.empty_strided), "PrivateUse1")
    own.impl("_copy_from", _copy, "PrivateUse1")
    for name in FACTORIES:
        packet, _, overload = name.partition(".")
        make = getattr(getattr(aten, packet), overload or "default")
        own.impl(name, _made_by(make), "PrivateUse1")
    vars(module)["libraries"] = (kernels, own)  # which end with their objects
    torch.autograd.set_multithreading_enabled(False)  # a fork has no threads of devices
    PartialState.default_device = property(lambda self: torch.device(DEVICE))


def _install_guard(folder: Path) -> None:
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(GUARD)
    headers = [f"-I{path}" for path in include_paths()]
    libraries = [f"-L{path}" for path in library_paths()]
    command = ["g++", "-std=c++20", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run([*command, *headers, *libraries, "-lc10"], check=True)
    ctypes.CDLL(str(library)).install()


def _inside(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value.held if isinstance(value, Elsewhere) else value


def _made_by(make: Callable[..., torch.Tensor]) -> Callable[..., Elsewhere]:
    def made(
        *args: Any,
        device: object = None,
        layout: object = None,
        pin_memory: object = None,
        **more: Any,
    ) -> Elsewhere:
        given = {key: value for key, value in more.items() if value is not None}
        return Elsewhere(make(*args, **given, device="cpu"))

    return made


def _copy(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _inside(target).copy_(_inside(source))
    return target
