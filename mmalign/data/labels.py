"""People's judgements of pairs of images, in one SQLite file.

Pairs and images are known by their content, so judgements outlive renamed files, a server that is
killed, and a training run that is resumed. Several processes may use the file at once.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mmalign.data.schema import content_id
from mmalign.data.votes import Agreement, LabelPair, Tally, agreement, round_robin
from mmalign.types import InputError

DATABASE = "labels.sqlite"
BUSY_SECONDS = 3.0
MAX_NAME = 40
VERSION = 1
SCHEMA = """
CREATE TABLE IF NOT EXISTS images (
    hash TEXT PRIMARY KEY,              -- of the encoded bytes, in hexadecimal
    path TEXT NOT NULL                  -- relative to the folder of candidates
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pairs (
    key TEXT PRIMARY KEY,               -- of prompt and images
    prompt TEXT NOT NULL,
    first TEXT NOT NULL REFERENCES images(hash),
    second TEXT NOT NULL REFERENCES images(hash),
    turn INTEGER NOT NULL,              -- position among the pairs of its prompt
    listed INTEGER NOT NULL             -- whether it is shown
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS judgements (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    pair TEXT NOT NULL REFERENCES pairs(key),
    annotator TEXT NOT NULL,
    winner TEXT REFERENCES images(hash),    -- NULL for a tie
    on_left TEXT NOT NULL,                  -- the image that was shown on the left
    made_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ', 'now')),
    UNIQUE (pair, annotator)
);
"""
PAIR = "p.key, p.prompt, p.first, p.second"


class LabelsUnavailableError(InputError):
    """The file cannot be read or written now: locked, full disk, damaged. Nothing was changed."""


class UnknownPairError(InputError):
    """No such pair, or not an image of it."""


class LabelImage(NamedTuple):
    """An image to choose from: the hash of its encoded bytes and its path below the folder."""

    hash: str
    path: str


class LabelGroup(NamedTuple):
    """Different images of one prompt, every two of which may be compared."""

    prompt: str
    images: Sequence[LabelImage]


class Shown(NamedTuple):
    """A pair as one person sees it."""

    key: str
    prompt: str
    left: str
    right: str


class Progress(NamedTuple):
    """Counts of shown pairs: all, those judged by anybody and by one person; and of people."""

    total: int
    judged: int
    mine: int
    people: int


class Labels:
    """The pairs to judge and what people said about them; safe to use from several threads."""

    def __init__(self, file: Path) -> None:
        """Open the file, or make it.

        Raises:
            LabelsUnavailableError: if it cannot be opened or is not such a file.
        """
        self.file = file
        self._lock = threading.Lock()
        with self._errors("open"):
            self._db = sqlite3.connect(
                file, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._db.create_function("shuffle", 2, _shuffle, deterministic=True)
            # With a write-ahead log and full synchronisation a commit is on disk when it returns,
            # and readers never wait for writers.
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
            self._db.execute("PRAGMA trusted_schema = OFF")  # the file may be a stranger's
            self._make_tables()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def add(self, groups: Iterable[LabelGroup], pairs_per_prompt: int | None = None) -> list[str]:
        """Show pairs of images, known ones with the judgements they have.

        Args:
            groups: images to compare.
            pairs_per_prompt: use only so many pairs of each group; all when omitted.

        Returns:
            The keys of the pairs.

        Raises:
            LabelsUnavailableError: if the file cannot be written.
        """
        keys = []
        with self._transaction() as db:
            for prompt, images in groups:
                db.executemany(
                    "INSERT INTO images VALUES (?, ?)"
                    " ON CONFLICT (hash) DO UPDATE SET path = excluded.path",
                    images,
                )
                chosen = round_robin(len(images))[:pairs_per_prompt]
                for turn, (one, other) in enumerate(chosen):
                    pair = make_pair(prompt, images[one].hash, images[other].hash)
                    db.execute(
                        "INSERT INTO pairs VALUES (?, ?, ?, ?, ?, 1) ON CONFLICT (key)"
                        " DO UPDATE SET turn = excluded.turn, listed = 1",
                        (*pair, turn),
                    )
                    keys.append(pair.key)
        return keys

    def unlist(self, image: str | None = None) -> None:
        """Stop showing the pairs of an image, or all pairs; their judgements are kept.

        Raises:
            LabelsUnavailableError: if the file cannot be written.
        """
        with self._transaction() as db:
            db.execute(
                "UPDATE pairs SET listed = 0"
                " WHERE listed AND (?1 IS NULL OR ?1 IN (first, second))",
                (image,),
            )

    def images(self) -> list[LabelImage]:
        """List the images of the pairs that are shown."""
        rows = self._rows(
            "SELECT hash, path FROM images WHERE hash IN"
            " (SELECT first FROM pairs WHERE listed UNION SELECT second FROM pairs WHERE listed)"
        )
        return [LabelImage(*row) for row in rows]

    def path(self, image: str) -> str | None:
        """Find the path of an image by its hash."""
        rows = self._rows("SELECT path FROM images WHERE hash = ?", image)
        return rows[0][0] if rows else None

    def next_pairs(self, annotator: str, limit: int) -> list[Shown]:
        """List pairs that a person has not judged, those with the fewest judgements first.

        Among equals, every prompt has its first pair before any has its second, and each person
        has an order of their own, so that people who work at once rarely judge the same pair.
        """
        rows = self._rows(
            f"SELECT {PAIR} FROM pairs p WHERE listed AND NOT EXISTS"
            " (SELECT 1 FROM judgements WHERE pair = p.key AND annotator = ?1)"
            " ORDER BY (SELECT count(*) FROM judgements WHERE pair = p.key), turn,"
            " shuffle(?1, p.key) LIMIT ?2",
            annotator,
            limit,
        )
        return [show(LabelPair(*row), annotator) for row in rows]

    def judge(self, annotator: str, key: str, winner: str | None) -> None:
        """Record which image of a pair a person prefers, None for a tie; on disk on return.

        A judgement of the same pair by the same person is replaced, so sending one again is safe.

        Raises:
            UnknownPairError: if there is no such pair, or it has no such image.
            LabelsUnavailableError: if the file cannot be written.
        """
        pair = self._pair(key)
        if winner not in (None, pair.first, pair.second):
            raise UnknownPairError(f"the pair {key} has no image {winner}")
        with self._transaction() as db:
            db.execute(
                "INSERT INTO judgements (pair, annotator, winner, on_left) VALUES (?, ?, ?, ?)"
                " ON CONFLICT (pair, annotator)"
                " DO UPDATE SET winner = excluded.winner, on_left = excluded.on_left",
                (key, annotator, winner, show(pair, annotator).left),
            )

    def undo(self, annotator: str, key: str) -> Shown:
        """Remove a person's judgement of a pair, if there is one; returns the pair.

        Raises:
            UnknownPairError: if there is no such pair.
            LabelsUnavailableError: if the file cannot be written.
        """
        pair = self._pair(key)
        with self._transaction() as db:
            db.execute("DELETE FROM judgements WHERE pair = ? AND annotator = ?", (key, annotator))
        return show(pair, annotator)

    def last(self, annotator: str) -> str | None:
        """Find the pair that a person judged last."""
        rows = self._rows(
            "SELECT pair FROM judgements WHERE annotator = ? ORDER BY id DESC LIMIT 1", annotator
        )
        return rows[0][0] if rows else None

    def progress(self, annotator: str) -> Progress:
        """Count what is done of the pairs that are shown."""
        rows = self._rows(
            "SELECT count(DISTINCT p.key), count(DISTINCT j.pair),"
            " count(DISTINCT j.pair) FILTER (WHERE j.annotator = ?), count(DISTINCT j.annotator)"
            " FROM pairs p LEFT JOIN judgements j ON j.pair = p.key WHERE p.listed",
            annotator,
        )
        return Progress(*rows[0])

    def people(self, keys: Sequence[str]) -> int:
        """Count those who judged at least one of these pairs."""
        wanted = set(keys)
        rows = self._rows("SELECT DISTINCT annotator, pair FROM judgements")
        return len({annotator for annotator, pair in rows if pair in wanted})

    def agreement(self) -> Agreement:
        """Measure how far people agree on the pairs that several of them judged."""
        return agreement(self.tallies(at_least=2))

    def tallies(self, keys: Sequence[str] | None = None, *, at_least: int = 1) -> list[Tally]:
        """Count the votes of each pair.

        Args:
            keys: only these pairs.
            at_least: leave out pairs with fewer judgements.
        """
        rows = self._rows(
            f"SELECT {PAIR}, sum(j.winner IS p.first), sum(j.winner IS p.second),"
            " sum(j.winner IS NULL) FROM pairs p JOIN judgements j ON j.pair = p.key"
            " GROUP BY p.key HAVING count(*) >= ? ORDER BY min(j.id)",
            at_least,
        )
        wanted = None if keys is None else set(keys)
        return [
            Tally(LabelPair(*row[:4]), *row[4:])
            for row in rows
            if wanted is None or row[0] in wanted
        ]

    def _pair(self, key: str) -> LabelPair:
        rows = self._rows(f"SELECT {PAIR} FROM pairs p WHERE key = ?", key)
        if not rows:
            raise UnknownPairError(f"there is no pair {key[:80]}")
        return LabelPair(*rows[0])

    def _make_tables(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == VERSION:
            return
        if version:
            raise sqlite3.DatabaseError(f"it has format {version}, this mmalign knows {VERSION}")
        self._db.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")

    def _rows(self, query: str, *values: str | int) -> list[tuple[Any, ...]]:
        with self._errors("read"), self._lock:
            return self._db.execute(query, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._errors("write"), self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise LabelsUnavailableError(f"cannot {action} {self.file}: {error}") from error


def make_pair(prompt: str, one: str, other: str) -> LabelPair:
    """Make the pair of two images, whichever is named first."""
    first, second = sorted((one, other))
    key = content_id(prompt, bytes.fromhex(first), bytes.fromhex(second))
    return LabelPair(key, prompt, first, second)


def show(pair: LabelPair, annotator: str) -> Shown:
    """Lay out a pair for a person: the side of each image is drawn, but always the same."""
    swap = _shuffle(annotator, pair.key) % 2
    left, right = (pair.second, pair.first) if swap else (pair.first, pair.second)
    return Shown(pair.key, pair.prompt, left, right)


def check_name(name: str) -> str:
    """Tidy the name of a person.

    Raises:
        InputError: if it is empty, too long, or has characters that cannot be shown.
    """
    tidy = " ".join(unicodedata.normalize("NFC", name).split())
    if not 1 <= len(tidy) <= MAX_NAME or not tidy.isprintable():
        raise InputError(f"a name has 1 to {MAX_NAME} printable characters")
    return tidy


def _shuffle(annotator: str, key: str) -> int:
    digest = hashlib.blake2b(f"{annotator}\0{key}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big")
