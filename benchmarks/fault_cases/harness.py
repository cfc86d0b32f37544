"""What a case is, how it is run, and how its outcome is kept and shown."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from xml.etree import ElementTree

ANSWER_LENGTH = 240
MARK = "FAULT_CASE"
POLL_SECONDS = 0.005
REPOSITORY = Path(__file__).resolve().parents[2]

ROWS = {
    1: "SIGKILL at random points, then resume",
    2: "SIGKILL at each file boundary of a save",
    3: "SIGTERM in train, evaluation, sampling, reward and save; 1 and 2 processes",
    4: "disk full, read-only folder, cache that cannot be written",
    5: "damaged checkpoints",
    6: "NaN and infinity",
    7: "bad images",
    8: "bad rows",
    9: "traversal",
    10: "malicious pickles",
    11: "code in a model's repository",
    12: "HTML and terminal injection",
    13: "failing rewards",
    14: "a rank that dies or hangs",
    15: "determinism",
    16: "LoRA round trip",
    17: "invariants of the methods",
    18: "no network",
}


@dataclass
class Tally:
    """Counts the points of a case; `answers` says how the first of each kind was answered."""

    tried: int = 0
    survived: int = 0
    answers: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def point(self, ok: bool, problem: str = "") -> None:
        """Count one point; `problem` says what was wrong if it failed."""
        self.tried += 1
        self.survived += ok
        if not ok:
            self.failures.append(problem)

    def refused(self, said: Said, *words: str) -> None:
        """Count a command that must end with code 2 and one line that has the words."""
        self.point(said.refuses(*words), said.error)
        if said.refuses(*words):
            self.answers.append(said.error.removeprefix("error: "))

    def answer(self) -> str:
        """Say in one line how the points were answered: what failed, or else what was said."""
        said = self.failures or self.answers or ["as expected"]
        text = " | ".join(dict.fromkeys(said))
        return text if len(text) <= ANSWER_LENGTH else text[: ANSWER_LENGTH - 3] + "..."


Action = Callable[[Path, Tally], object]


class Case(NamedTuple):
    """A fault: its row of the gate, what is expected, and the function that injects it.

    `quick` cases also run among the tests. `limit` is in seconds.
    """

    row: int
    name: str
    expects: str
    action: Action
    quick: bool
    limit: float


@dataclass(frozen=True)
class Outcome:
    """What came of a case."""

    row: int
    name: str
    expects: str
    tried: int
    survived: int
    answer: str
    seconds: float


CASES: list[Case] = []


def case(
    row: int, name: str, expects: str, *, quick: bool = False, limit: float = 120.0
) -> Callable[[Action], Action]:
    """Add the decorated function to the list of cases."""

    def add(action: Action) -> Action:
        CASES.append(Case(row, name, expects, action, quick, limit))
        return action

    return add


def run_case(which: Case, folder: Path) -> Outcome:
    """Run a case in a fork, in its own empty folder and process group, under its time limit."""
    started = time.monotonic()
    folder.mkdir(parents=True)
    report = folder / "outcome.json"
    child = os.fork()
    if child == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _in_child(which, folder, report)
    ended = False
    try:
        while not ended and time.monotonic() < started + which.limit:
            time.sleep(POLL_SECONDS)
            ended = os.waitpid(child, os.WNOHANG)[0] != 0
    finally:  # also when the campaign itself is told to end
        if not ended:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
        kill(programs_of(folder))
    tally = Tally(tried=1, failures=[f"no outcome within {which.limit:g} s"])
    if report.exists():
        text = report.read_text()
        for place, name in ((folder, "RUN"), (folder.parents[1], "WORK"), (REPOSITORY, "SOURCE")):
            text = text.replace(f"{place}/", f"{name}/").replace(str(place), name)
        tally = Tally(**json.loads(text))
    return Outcome(
        row=which.row,
        name=which.name,
        expects=which.expects,
        tried=tally.tried,
        survived=tally.survived,
        answer=tally.answer(),
        seconds=time.monotonic() - started,
    )


def programs_of(folder: Path) -> list[int]:
    """List the programs that the case in `folder` has started and that are left.

    Forks of the case are not among them, which only its process group has; but all that those have
    executed are, in whatever group or session.
    """
    mark, found = f"{MARK}={folder}".encode(), []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):  # it has ended, or is not ours
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def kill(processes: Iterable[int]) -> None:
    """Send SIGKILL."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _in_child(which: Case, folder: Path, report: Path) -> None:
    tally = Tally()
    os.environ[MARK] = str(folder)
    try:
        os.chdir(folder)
        which.action(folder, tally)
    except BaseException as error:
        traceback.print_exc()
        tally.point(False, f"{type(error).__name__}: {error}".replace("\n", " ")[:ANSWER_LENGTH])
    report.write_text(json.dumps(asdict(tally)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class Said(NamedTuple):
    """How a command ended: exit code, or minus the signal, and what it printed."""

    code: int
    text: str

    @property
    def error(self) -> str:
        """The one line of an input error; all that was printed when there is not exactly one."""
        if self.code == 0:
            return "succeeded"
        lines = [line for line in self.text.splitlines() if line.startswith("error: ")]
        clean = len(lines) == 1 and "Traceback" not in self.text
        return lines[0] if clean else f"code {self.code}: {' '.join(self.text.split())[-400:]}"

    def refuses(self, *words: str) -> bool:
        """Whether it is exit code 2 and one line that contains the words."""
        line = self.error
        return self.code == 2 and line.startswith("error: ") and all(w in line for w in words)


class Command:
    """`mmalign ARGV` in a fork of this process, which has imported the heavy libraries already."""

    def __init__(
        self, argv: Sequence[str], log: Path, before: Callable[[], object] | None = None
    ) -> None:
        """Start it; its output goes to `log`, and `before` is called in it first."""
        sys.stdout.flush()
        sys.stderr.flush()
        self.log = log
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._become(list(argv), before)

    def _become(self, argv: list[str], before: Callable[[], object] | None) -> None:
        code = 99
        try:
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            # Whoever runs the cases may have put other objects in their place.
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", closefd=False) for fd in (1, 2))
            from mmalign.cli import main

            if before is not None:
                before()
            code = main(argv)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def send(self, number: int) -> None:
        """Send a signal."""
        if not self.ended:
            os.kill(self.pid, number)

    def wait(self, seconds: float = 60.0) -> Said:
        """Wait for the end; kills it and says -9 when there is none."""
        deadline = time.monotonic() + seconds
        while not self.ended:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                deadline = float("inf")
            time.sleep(POLL_SECONDS)
        assert self.code is not None
        return Said(self.code, self.log.read_text(errors="replace") if self.log.exists() else "")


def mmalign(
    *argv: str,
    log: Path | None = None,
    before: Callable[[], object] | None = None,
    seconds: float = 60.0,
) -> Said:
    """Run `mmalign ARGV` to its end."""
    return Command(argv, log or Path("log.txt"), before).wait(seconds)


def fork(action: Callable[[], object]) -> int:
    """Run `action` in a fork; returns 0, 2 after an input error, 99 after another, or -signal."""
    from mmalign.types import InputError

    child = os.fork()
    if child == 0:
        try:
            action()
        except InputError:
            os._exit(2)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def from_tests(row: int, name: str, expects: str, *nodes: str, limit: float = 240.0) -> None:
    """Add a case whose points are tests: each parametrization counts."""

    def action(folder: Path, tally: Tally) -> None:
        report = folder / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *nodes]
        subprocess.run(command, cwd=REPOSITORY, check=False, capture_output=True)
        for found in ElementTree.parse(report).getroot().iter("testcase"):
            if found.find("skipped") is None:
                problems = [*found.findall("failure"), *found.findall("error")]
                said = f"{found.get('name')}: {problems[0].get('message')}" if problems else ""
                tally.point(not problems, said)
        tally.answers.append("as the tests demand: " + ", ".join(nodes))

    case(row, name, expects, limit=limit)(action)


def die_at(number: int, within: Sequence[str] = ()) -> list[int]:
    """Kill this process at a point of its file work; returns the running count of such points.

    Points are the boundaries: the moments before any file is opened for writing, renamed or
    removed; and the lines executed in the named files of the package.
    """
    count = [0]

    def passed() -> None:
        count[0] += 1
        if count[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.endswith(tuple(within)):
            return None
        if event == "line":
            passed()
        return trace

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            passed()

    sys.addaudithook(audit)  # cannot be taken back, which is no matter in a fork
    if within:
        sys.settrace(trace)
    return count


FILE_EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}
