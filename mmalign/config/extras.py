"""Optional packages, and what to say where one is missing."""

from __future__ import annotations

from importlib.util import find_spec

TRACKERS = ("tensorboard", "wandb", "trackio")
"""Trackers that have an extra of their own in `pyproject.toml`."""

NO_DEEPSPEED = "accelerate_config: DeepSpeed is not installed; pip install 'mmalign[deepspeed]'"


def is_installed(package: str) -> bool:
    """Tell whether a top-level package can be imported, without importing it."""
    return find_spec(package) is not None


def how_to_install(tracker: str) -> str:
    """Say how to get a tracker."""
    if tracker in TRACKERS:
        return f"pip install 'mmalign[{tracker}]', or leave it out"
    return "install it or leave it out"
