"""Reading of weight files that may come from anywhere: tensors only, never code."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmalign.types import InputError


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
        raise InputError(f"weight file {path} is damaged: {str(error).splitlines()[0]}") from error
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise InputError(f"weight file {path} is not a dictionary of tensors")
    return tensors
