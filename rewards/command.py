"""Any program as a reward, over its standard input and output."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import shlex
import signal
import subprocess
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import IO

from mmalign.endpoint import MAX_REPLY_BYTES
from mmalign.rewards._external import UNBOUNDED, ExternalReward
from mmalign.types import InputError, Modality

GRACE = 2.0
"""Seconds that a program has to leave after its input has ended."""

logger = logging.getLogger(__name__)


class CommandReward(ExternalReward):
    """Runs a program that reads requests and writes replies, one line of JSON each.

    The program is started once, without a shell, and must end when its input ends. It writes
    nothing but replies to standard output; messages go to standard error, of which the last line is
    shown when something fails. Lines are as `_external` describes.

    Not differentiable; the range is what the user states, unbounded otherwise. A program that died
    is started again once per request. A program that takes longer than `timeout` is ended with
    everything it started.
    """

    def __init__(
        self,
        command: Sequence[str],
        name: str = "command",
        timeout: float = 120.0,
        batch_size: int = 16,
        range: Sequence[float] = UNBOUNDED,
        modality: Modality = "image",
        scores_sets: bool = False,
    ) -> None:
        """Start the program.

        Args:
            command: program and arguments, such as `[python3, scorer.py]`.
            name: name in reports.
            timeout: seconds that one request may take; the first includes the program's start.
            batch_size: images per request.
            range: smallest and largest score.
            modality: `image`, or `text` to score answers.
            scores_sets: whether a sample is scored against the others of its prompt: a request then
                holds whole prompts.

        Raises:
            InputError: the program cannot be started, or an option is out of range.
        """
        super().__init__(
            name,
            timeout=timeout,
            batch_size=batch_size,
            range=range,
            modality=modality,
            scores_sets=scores_sets,
        )
        if isinstance(command, str) or not command:
            raise InputError(
                f"reward {name}: command must be a list, such as [python3, scorer.py];"
                " no shell reads it"
            )
        self.command = [str(word) for word in command]
        self._shown = " ".join(shlex.join(self.command).split())[:100]
        self._program = self._start()

    def _start(self) -> _Program:
        try:
            return _Program(self.command)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise self._failure(f"cannot start {self._shown}: {reason}") from error

    def _ask(self, request: bytes) -> bytes:
        """Ask the program; ask a new one when it has died."""
        try:
            return self._exchange(request)
        except _EndedError as error:
            logger.warning("reward %s %s; started again", self.name, error)
            self._program = self._start()
        try:
            return self._exchange(request)
        except _EndedError as error:
            raise self._failure(f"{self._shown} {error}") from error

    def _exchange(self, request: bytes) -> bytes:
        try:
            reply = self._program.exchange(request, self.timeout)
        except TimeoutError as error:
            self._program.stop()
            problem = f"no answer within {self.timeout:g} s{self._program.last_words()}"
            raise self._failure(f"{self._shown} gives {problem}") from error
        except _StrayLineError as error:
            raise self._failure(f"wrote a line that nobody asked for: {error}") from error
        if len(reply) > MAX_REPLY_BYTES:
            self._program.stop()
            raise self._failure(f"its reply is longer than {MAX_REPLY_BYTES} bytes")
        return reply


class _EndedError(Exception):
    """The program is no longer there; the message is a predicate of it."""


class _StrayLineError(Exception):
    """The program wrote something before it was asked."""


class _Program:
    """A running program. Threads move the data, so that no full pipe blocks either side."""

    def __init__(self, command: Sequence[str]) -> None:
        # A session of its own, so that what it starts can be ended together with it.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdin
        assert self._process.stdout
        assert self._process.stderr
        self._input = self._process.stdin.fileno()
        self._lines: queue.Queue[bytes] = queue.Queue(maxsize=8)
        self._errors: deque[bytes] = deque(maxlen=1)
        _background(_read_lines, self._process.stdout, self._lines)
        self._listener = _background(_read_errors, self._process.stderr, self._errors)
        weakref.finalize(self, _leave, self._process)

    def exchange(self, request: bytes, timeout: float) -> bytes:
        """Send a line and wait for one.

        Raises:
            TimeoutError: none came in time.
            _EndedError: the program ended.
            _StrayLineError: a line was there already.
        """
        deadline = time.monotonic() + timeout
        if not self._lines.empty():
            line = self._lines.get()
            raise _StrayLineError(repr(line[:80])) if line else self._ended()
        writer = _background(_write, self._input, request)
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError from None
        if not line:
            raise self._ended()
        writer.join(max(0.0, deadline - time.monotonic()))
        if writer.is_alive():  # it answered without reading what it was asked
            raise TimeoutError
        return line

    def last_words(self) -> str:
        """Return the last line of standard error, led by a colon."""
        text = self._errors[0].decode("utf-8", "replace").strip() if self._errors else ""
        return f": {text[:300]}" if text else ""

    def stop(self) -> None:
        """End the program and everything it started."""
        _kill(self._process)
        self._listener.join(GRACE)

    def _ended(self) -> _EndedError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        code = self._process.poll()
        self.stop()
        how = "closed its output" if code is None else f"ended with code {code}"
        return _EndedError(how + self.last_words())


def _background(target: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread


def _read_lines(stream: IO[bytes], lines: queue.Queue[bytes]) -> None:
    """Pass on lines, and b"" at the end; a line without end is cut off past the limit."""
    with stream:
        while line := stream.readline(MAX_REPLY_BYTES + 1):
            lines.put(line)
    lines.put(b"")


def _read_errors(stream: IO[bytes], last: deque[bytes]) -> None:
    with stream:
        while line := stream.readline(MAX_REPLY_BYTES):
            if line.strip():
                last.append(line)


def _write(descriptor: int, data: bytes) -> None:
    """Write everything; a program that is gone is noticed where its reply is missed."""
    left = memoryview(data)
    with contextlib.suppress(OSError):
        while left:
            left = left[os.write(descriptor, left) :]


def _leave(process: subprocess.Popen[bytes]) -> None:
    """Let the program leave by the end of its input, or end it."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is not None:  # its number may belong to another process by now
        return
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
