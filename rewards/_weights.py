"""Reading of weight files that may come from anywhere: tensors only, never code."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmalign.config import as_path
from mmalign.types import InputError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
DTYPES = ("float32", "float16", "bfloat16", "float64")


def to_dtype(name: str) -> torch.dtype:
    """Look up a dtype of weights by its name.

    Raises:
        InputError: for anything but float32, float16, bfloat16 and float64.
    """
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is none of {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def find_file(source: str, name: str) -> Path:
    """Find a file of a published checkpoint.

    Args:
        source: the file itself, a folder that has it, `pkg://package/folder`, or a hub id.
        name: its name in the folder or on the hub.

    Raises:
        InputError: if there is no such file.
    """
    path = as_path(source)
    if path.is_file():
        return path
    if path.is_dir():
        if (path / name).is_file():
            return path / name
        raise InputError(f"folder {path} has no {name}")
    if not HUB_ID.fullmatch(source):
        raise InputError(f"{source}: no such file, folder or hub id")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, name))
    except (OSError, ValueError) as error:  # what huggingface_hub raises derives from these
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{source}: {name} is not on the hub or in its cache: {reason}") from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read named tensors from a safetensors file, or a `.pth` file that holds nothing else.

    Raises:
        InputError: if the file is missing, damaged, or contains pickled objects.
    """
    if not path.is_file():
        raise InputError(f"weight file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"weight file {path} holds pickled objects, which are never loaded: "
            "convert it to safetensors"
        ) from error
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = (str(error).splitlines() or ["it is empty or cut"])[0]
        raise InputError(f"weight file {path} is damaged: {reason}") from error
    except Exception as error:  # torch takes other files for pickles, and stumbles over any byte
        raise InputError(f"weight file {path} is not a file of torch or safetensors") from error
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise InputError(f"weight file {path} is not a dictionary of tensors")
    return tensors


def load_into(network: nn.Module, tensors: Mapping[str, Tensor], where: object) -> None:
    """Copy every weight of a network from `tensors`, which must name them all and no others.

    Raises:
        InputError: naming `where` and the first few weights that are missing, left over or of
            another shape.
    """
    wanted = network.state_dict()
    missing = [name for name in wanted if name not in tensors]
    extra = [name for name in tensors if name not in wanted]
    shapes = [n for n in wanted if n in tensors and wanted[n].shape != tensors[n].shape]
    for what, names in (
        ("lacks", missing),
        ("has unknown", extra),
        ("has other shapes of", shapes),
    ):
        if names:
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            raise InputError(f"{where} is not a checkpoint of this model: it {what} {listed}")
    network.load_state_dict(tensors)
