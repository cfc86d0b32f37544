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


def changed_options(before: str, after: str) -> list[str]:
    """List what differs between two dumped configurations, as `name: old -> new`."""
    import yaml

    old, new = (_flat(yaml.safe_load(text)) for text in (before, after))
    return [
        f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Map dotted option names to values; lists are values."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}".lstrip("."))
    return flat


def as_path(text: str | Path) -> Path:
    """Expand `~` and resolve `pkg://package/folder` to a folder inside an installed package."""
    value = str(text)
    if not value.startswith("pkg://"):
        return Path(value).expanduser()
    from importlib.resources import files

    package, _, inside = value.removeprefix("pkg://").partition("/")
    return Path(str(files(package).joinpath(inside)))
