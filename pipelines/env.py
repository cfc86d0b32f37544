"""`mmalign env`: what a bug report needs to know about the installation and the machine."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign import report
from mmalign.config import TRACKERS, is_installed

if TYPE_CHECKING:
    from mmalign.config import EnvConfig

PACKAGES = (
    *report.PACKAGES,
    "torchvision",
    "tokenizers",
    "huggingface-hub",
    "safetensors",
    "numpy",
)
VARIABLES = re.compile(
    r"(ACCELERATE|CUDA|HF|HUGGINGFACE|MKL|NCCL|OMP|PYTORCH|TORCH|TRACKIO|TRANSFORMERS|WANDB|XLA)_\w+"
    r"|(HTTPS?|ALL|NO)_PROXY|TOKENIZERS_PARALLELISM|MASTER_ADDR|RANK|LOCAL_RANK|WORLD_SIZE",
    re.IGNORECASE,
)
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|AUTH|CREDENTIAL|COOKIE|HEADERS|PROXY", re.IGNORECASE)
HARMLESS = {"TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH"}
QUERY_SECONDS = 10


def run(config: EnvConfig) -> None:
    """Print versions, platform, devices and settings; values of secret variables are masked."""
    facts = describe_environment()
    if config.json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return
    width = max(map(len, facts)) + 2
    sys.stdout.writelines(f"{name:{width}}{value}\n" for name, value in facts.items())


def describe_environment() -> dict[str, str]:
    """Collect versions, platform, devices and settings by name."""
    import torch

    facts = {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
    }
    facts |= {name: _version(name) for name in PACKAGES}
    facts["mmalign from"] = _origin()
    facts["trackers"] = ", ".join(f"{n} {_version(n)}" for n in TRACKERS if is_installed(n))
    facts["trackers"] = facts["trackers"] or "none installed"
    facts |= _devices()
    facts["accelerate config"] = _accelerate_config()
    facts |= _variables()
    return facts


def _devices() -> dict[str, str]:
    import torch

    facts = {"torch build": f"CUDA {torch.version.cuda}, ROCm {torch.version.hip}"}
    drivers = _drivers() if torch.cuda.is_available() else []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.1f} GiB"
        capability = f"compute {properties.major}.{properties.minor}"
        facts[f"cuda:{index}"] = f"{properties.name}, {memory}, {capability}"
    if torch.cuda.device_count() == 0:
        facts["cuda"] = "no device"
    if drivers:
        facts["driver"] = ", ".join(drivers)
    if torch.backends.mps.is_available():
        facts["mps"] = f"{torch.mps.recommended_max_memory() / 2**30:.1f} GiB"
    else:
        facts["mps"] = "no device"
    return facts


def _drivers() -> list[str]:
    """Ask NVIDIA's tool for its driver, which torch does not tell."""
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return sorted({line.strip() for line in lines.splitlines() if line.strip()})


def _origin() -> str:
    """Say how mmalign was installed, and from which commit where it is a checkout of git."""
    try:
        source = distribution("mmalign").read_text("direct_url.json")
    except PackageNotFoundError:
        source = None
    details = json.loads(source) if source else {}
    commit = details.get("vcs_info", {}).get("commit_id")
    if commit:
        return f"git, commit {commit[:12]}"
    if not details.get("dir_info", {}).get("editable"):
        return "a wheel"
    return f"an editable checkout{_commit(Path(__file__).resolve().parent)}"


def _commit(folder: Path) -> str:
    commit = _output("git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*")
    return f", commit {commit.strip()}" if commit else ""


def _output(*command: str) -> str:
    """Run a small tool; nothing comes back where it is absent or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=QUERY_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _accelerate_config() -> str:
    """Put accelerate's default config on one line, as far as it is not a network address."""
    import yaml
    from accelerate.commands.config.config_args import default_config_file

    path = Path(default_config_file)
    if not path.is_file():
        return "none"
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return f"cannot be read ({type(error).__name__})"
    if not isinstance(values, dict):
        return "is not a mapping"
    shown = {k: v for k, v in values.items() if v is not None and "ip" not in str(k).split("_")}
    return json.dumps(shown, default=str)


def _variables() -> dict[str, str]:
    """Collect environment variables that change what libraries do."""
    facts = {}
    for name, value in sorted(os.environ.items()):
        if VARIABLES.fullmatch(name):
            hidden = SECRET.search(name) and name not in HARMLESS
            facts[f"${name}"] = "(set)" if hidden else json.dumps(value)[1:-1]
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
