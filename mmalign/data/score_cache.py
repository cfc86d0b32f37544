"""Scores that were computed before, by what was scored and what scored it.

A folder of the cache belongs to one reward with its options and its revision. It holds parquet
files of keys and scores. A file is written under a name of its own, complete or not at all, and
never changed, so any number of processes may use a cache at once: at worst they compute a score
twice. A file that is damaged is reported and removed, and its scores are computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.data.files import atomic_path, write_bytes
from mmalign.data.images import hash_image
from mmalign.data.schema import HASH_BYTES, RowError, content_hash
from mmalign.types import ImageRef, InputError

if TYPE_CHECKING:
    from torch import Tensor

    from mmalign.types import Response

IDENTITY = "reward.json"
MOST_FILES = 16
"""More files than this are written anew as one."""

logger = logging.getLogger(__name__)


class ScoreCache:
    """Scores of one reward by the key of the sample.

    Attributes:
        folder: where its files are.
        hits: scores that were found.
        misses: scores that were not.
    """

    def __init__(self, root: Path, name: str, identity: Mapping[str, Any]) -> None:
        """Read what is known.

        Args:
            root: folder of the whole cache.
            name: name of the reward, for people who look into the folder.
            identity: everything a score depends on besides the sample; it names the folder.

        Raises:
            InputError: if the folder cannot be made.
        """
        text = json.dumps(identity, sort_keys=True, default=str, indent=1)
        label = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[:60]
        self.folder = root / f"{label}-{content_hash(text.encode()).hex()[:16]}"
        self.hits = self.misses = 0
        self._known: dict[bytes, float] = {}
        self._new: dict[bytes, float] = {}
        if not (self.folder / IDENTITY).exists():
            write_bytes(self.folder / IDENTITY, text.encode())
        files = sorted(self.folder.glob("*.parquet"))
        read = [file for file in files if self._read(file)]
        if len(read) > MOST_FILES:
            self._merge(read)

    def get(self, keys: Sequence[bytes]) -> list[float | None]:
        """Look up scores; None where one is not known."""
        found = [self._known.get(key) for key in keys]
        missing = found.count(None)
        self.misses += missing
        self.hits += len(found) - missing
        return found

    def put(self, scores: Mapping[bytes, float]) -> None:
        """Remember scores; `save` writes them."""
        self._known.update(scores)
        self._new.update(scores)

    def save(self) -> None:
        """Write what is new.

        Raises:
            InputError: if it cannot be written.
        """
        if self._new:
            self._write(self._new)
            self._new = {}

    def _write(self, scores: Mapping[bytes, float]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table(
            {
                "key": pa.array(list(scores), pa.binary(HASH_BYTES)),
                "score": pa.array(list(scores.values()), pa.float64()),
            }
        )
        path = self.folder / f"{os.getpid()}-{secrets.token_hex(6)}.parquet"
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary, write_page_checksum=True)

    def _read(self, file: Path) -> bool:
        try:
            scores = _scores(file)
        except FileNotFoundError:  # another process has just merged it into a new one
            return False
        except Exception as error:  # pyarrow raises nearly anything on damaged bytes
            reason = (str(error) or type(error).__name__).splitlines()[0][:120]
            logger.warning(
                "score cache: %s is damaged (%s); removed, its scores are computed again",
                *(file, reason),
            )
            with suppress(OSError):
                file.unlink()
            return False
        self._known.update(scores)
        return True

    def _merge(self, files: Iterable[Path]) -> None:
        """Write everything as one file, and only then remove those that it replaces."""
        self._write(self._known)
        for file in files:
            with suppress(OSError):
                file.unlink()


def image_key(image: Tensor, prompt: str) -> bytes:
    """Identify an image (3, H, W) in [0, 1] by its pixels, 8 bits per channel, and its prompt."""
    import torch

    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
    shape = "x".join(map(str, pixels.shape)).encode()
    return _key(shape, pixels.numpy().tobytes(), _encoded(prompt))


def response_key(response: Response, prompt: str) -> bytes:
    """Identify an answer by its text, its images, what else is known of it, and the question.

    Raises:
        InputError: if an image cannot be read.
    """
    images = [_image_hash(image) for image in response.images]
    fields = json.dumps(response.fields, sort_keys=True, default=str)
    return _key(_encoded(response.text), _encoded(fields), _encoded(prompt), *images)


def _key(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()


def _image_hash(image: Any) -> bytes:
    if not isinstance(image, ImageRef):
        return _key(str(image.size).encode(), image.convert("RGB").tobytes())
    try:
        return hash_image(image)
    except RowError as error:
        raise InputError(f"{image.where}: {error}") from error


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _scores(file: Path) -> dict[bytes, float]:
    """Read a file of the cache.

    Raises:
        ValueError: its columns or values are not those of a cache; pyarrow has its own errors.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(file, page_checksum_verification=True, partitioning=None)
    expected = pa.schema([("key", pa.binary(HASH_BYTES)), ("score", pa.float64())])
    if not table.schema.equals(expected):
        raise ValueError("other columns than key and score")
    scores = dict(zip(table["key"].to_pylist(), table["score"].to_pylist(), strict=True))
    if not all(score is not None and math.isfinite(score) for score in scores.values()):
        raise ValueError("a score that is not a finite number")
    return scores
