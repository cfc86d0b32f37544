"""Replies that were expensive to get, kept in a file as they come."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable
from pathlib import Path

from mmalign.data.files import read_jsonl, writing
from mmalign.data.schema import RowError


class KeptReplies:
    """A file of JSON lines with what was asked, as a hash, and what came back.

    An interrupted run leaves it complete but for the last line, so the same run again goes on where
    it stopped. May be used from several threads.
    """

    def __init__(self, path: Path) -> None:
        """Read the replies of an earlier run, where there are some.

        Raises:
            InputError: if the file cannot be read.
        """
        self._path, self._lock = path, threading.Lock()
        self._known: dict[str, str] = {}
        if not path.exists():
            return
        for _, row in read_jsonl(path):
            if isinstance(row, RowError):
                continue  # cut off: asked for again
            request, reply = row.get("request"), row.get("reply")
            if isinstance(request, str) and isinstance(reply, str):
                self._known[request] = reply
        _end_last_line(path)

    @staticmethod
    def key(*parts: str) -> str:
        """Hash everything that a reply depends on."""
        return hashlib.blake2b("\x1f".join(parts).encode(), digest_size=16).hexdigest()

    def get(self, key: str) -> str | None:
        """Look up a reply; None when there is none."""
        return self._known.get(key)

    def keep(self, replies: Iterable[tuple[str, str]]) -> None:
        """Add replies by key.

        Raises:
            InputError: if the file cannot be written.
        """
        found = dict(replies)
        lines = [json.dumps({"request": k, "reply": r}) + "\n" for k, r in found.items()]
        with self._lock, writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as stream:
                stream.writelines(lines)
            self._known |= found


def _end_last_line(path: Path) -> None:
    with writing(path), path.open("rb+") as stream:
        if stream.seek(0, 2) == 0:
            return
        stream.seek(-1, 2)
        if stream.read(1) != b"\n":
            stream.write(b"\n")
