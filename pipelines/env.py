"""`mmalign env`: what a bug report needs to know about the installation and the machine."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from mmalign import report

if TYPE_CHECKING:
    from mmalign.config import EnvConfig

PACKAGES = (*report.PACKAGES, "safetensors", "numpy")


def run(config: EnvConfig) -> None:
    """Print versions, platform and devices."""
    facts = describe_environment()
    if config.json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return
    width = max(map(len, facts)) + 2
    sys.stdout.writelines(f"{name:{width}}{value}\n" for name, value in facts.items())


def describe_environment() -> dict[str, str]:
    """Collect versions, platform and devices by name."""
    import torch

    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
    }
    facts |= {name: _version(name) for name in PACKAGES}
    facts["cuda"] = str(torch.version.cuda)
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        facts[f"cuda:{index}"] = f"{properties.name}, {memory:.1f} GiB"
    facts["mps"] = "available" if torch.backends.mps.is_available() else "not available"
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
