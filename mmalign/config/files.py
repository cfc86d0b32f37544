"""Configurations and paths as text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any


def dump_config(config: Any) -> str:
    """Write a configuration dataclass as the YAML that reads back to it."""
    import yaml

    text: str = yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)
    return text


def as_path(text: str | Path) -> Path:
    """Expand `~` and resolve `pkg://package/folder` to a folder inside an installed package."""
    value = str(text)
    if not value.startswith("pkg://"):
        return Path(value).expanduser()
    from importlib.resources import files

    package, _, inside = value.removeprefix("pkg://").partition("/")
    return Path(str(files(package).joinpath(inside)))
