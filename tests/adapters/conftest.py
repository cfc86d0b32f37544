from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mmalign.adapters import load_vlm
from mmalign.adapters._vlm import VlmFamily
from mmalign.config import VlmModelConfig


@pytest.fixture(scope="session")
def vlm_adapter(vlm: Callable[[str], Path]) -> Callable[[str], VlmFamily]:
    """Load a tiny vision-language model by name, once per session."""
    loaded: dict[str, VlmFamily] = {}

    def load(name: str) -> VlmFamily:
        if name not in loaded:
            loaded[name] = load_vlm(VlmModelConfig(model=str(vlm(name)), offline=True), "cpu")
        return loaded[name]

    return load
