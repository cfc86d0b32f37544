"""Row 18: a machine without any network. Needs the right to make a network namespace."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from .harness import REPOSITORY, Tally, case
from .toys import METHODS, TOYS

ALONE = ["unshare", "--net", "--map-root-user"]


def isolated(argv: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program in a namespace that has no network but its own, loopback included or not."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "HOME": str(folder)}
    up = ["sh", "-c", 'ip link set lo up 2>/dev/null; exec "$@"', "sh"]
    return subprocess.run(
        [*ALONE, *up, *argv], env=env, text=True, capture_output=True, check=False
    )


@case(18, "proof that there is no network", "a connection fails at once")
def proof(folder: Path, tally: Tally) -> None:
    """An address that would answer elsewhere cannot be reached."""
    program = "import socket; socket.create_connection(('192.0.2.1', 80), 3)"
    said = isolated([sys.executable, "-c", program], folder)
    tally.point("unreachable" in said.stderr, said.stderr[-200:])
    tally.answers.append("network is unreachable")


def trains(method: str, folder: Path, tally: Tally) -> None:
    """Train with the command that users run."""
    argv = [sys.executable, "-m", "mmalign", *TOYS.train(method, folder / "run", "--max_steps=2")]
    said = isolated(argv, folder)
    tally.point(said.returncode == 0, said.stderr[-300:].replace("\n", " "))
    tally.answers = ["trains"]


for _method in METHODS:
    case(18, f"train {_method}", "works on local models")(partial(trains, _method))


@case(18, "the whole suite", "passes", limit=3000)
def suite(folder: Path, tally: Tally) -> None:
    """Run all tests of the repository in the namespace."""
    from xml.etree import ElementTree

    report = folder / "report.xml"
    os.chdir(REPOSITORY)
    isolated([sys.executable, "-m", "pytest", "-q", f"--junitxml={report}"], folder)
    for found in ElementTree.parse(report).getroot().iter("testcase"):
        if found.find("skipped") is None:
            failed = found.find("failure") is not None or found.find("error") is not None
            tally.point(not failed, f"{found.get('name')}")
