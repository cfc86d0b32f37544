"""Random numbers keyed by what they are for, never by global state.

A draw depends on the keys alone (seed, step, sample id, purpose), so results do not change with the
number of workers, the order of evaluation or a resume.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Key = str | int


def derive_seed(*keys: Key) -> int:
    """Hash `keys` to an integer in [0, 2**63)."""
    text = "\x1f".join(f"{type(key).__name__}:{key}" for key in keys)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def keyed_generator(*keys: Key) -> torch.Generator:
    """Make a CPU `torch.Generator` seeded by `keys`."""
    import torch

    return torch.Generator().manual_seed(derive_seed(*keys))
