"""Asking a judge: one checked reply per prompt, several at a time, and nothing paid for twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from mmalign.endpoint import EndpointError
from mmalign.hallucination.kept import KeptReplies
from mmalign.types import InputError

Parsed = TypeVar("Parsed")


class Judge:
    """Gets a reply for each prompt and keeps it in a file as it comes.

    Replies are keyed by judge and prompt, so a run that was interrupted goes on where it stopped. A
    reply that cannot be read is asked for again.
    """

    def __init__(
        self,
        ask: Callable[[str], str],
        *,
        name: str,
        replies: Path,
        concurrency: int = 8,
        attempts: int = 3,
    ) -> None:
        """Read the replies of an earlier run.

        Args:
            ask: sends a prompt and returns the reply; called from several threads. ValueError says
                that the reply is unusable.
            name: address, model and settings of the judge, which replies are keyed by.
            replies: file of JSON lines that replies are added to.
            concurrency: prompts under way at a time.
            attempts: how often a prompt is sent until its reply can be read.

        Raises:
            InputError: if the file of replies cannot be read.
        """
        self._ask, self._name, self._kept = ask, name, KeptReplies(replies)
        self._concurrency, self._attempts = concurrency, attempts

    def ask_all(
        self,
        prompts: Sequence[str | None],
        parse: Callable[[str], Parsed],
        wheres: Sequence[str],
        done: Callable[[], object] = lambda: None,
    ) -> list[Parsed | None]:
        """Ask every prompt; None where there is none.

        Args:
            prompts: questions in order.
            parse: reads a reply; raises ValueError saying what is wrong with it.
            wheres: names the row of each prompt in messages.
            done: called after every prompt.

        Raises:
            InputError: naming the row, if the judge is out of reach or its replies cannot be read.
                Replies until then are kept.
        """
        stop = threading.Event()

        def work(index: int) -> Parsed | None:
            prompt = prompts[index]
            if prompt is None or stop.is_set():
                return None
            try:
                found = self._reply(prompt, parse, wheres[index])
            except BaseException:
                stop.set()  # what has not begun need not fail as well, one time-out after another
                raise
            done()
            return found

        with ThreadPoolExecutor(self._concurrency) as pool:
            futures = [pool.submit(work, index) for index in range(len(prompts))]
            try:
                return [future.result() for future in futures]
            finally:
                stop.set()

    def _reply(self, prompt: str, parse: Callable[[str], Parsed], where: str) -> Parsed:
        key = self._kept.key(self._name, prompt)
        known = self._kept.get(key)
        if known is not None:
            with suppress(ValueError):  # kept by a run that read replies otherwise: ask again
                return parse(known)
        problem, reply = "", ""
        for _ in range(self._attempts):
            try:
                reply = self._ask(prompt)
                parsed = parse(reply)
            except EndpointError as error:
                raise InputError(f"{where}: {error}") from error
            except ValueError as error:
                shown = " ".join(reply.split())[:80]
                problem = f"{error}{f': {shown!r}' if shown else ''}"
                continue
            self._kept.keep([(key, reply)])
            return parsed
        raise InputError(f"{where}: judge: {problem} ({self._attempts} attempts)")
