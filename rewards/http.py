"""A scorer behind a URL as a reward."""

from __future__ import annotations

import http.client
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import IO, Any
from urllib.parse import urlsplit

from mmalign.rewards._external import MAX_REPLY_BYTES, UNBOUNDED, ExternalReward
from mmalign.types import InputError

FIRST_PAUSE = 0.5
"""Seconds before the first new attempt; doubled before each further one."""
LONGEST_PAUSE = 30.0
CHUNK = 2**16
LOOPBACK = ("localhost", "127.0.0.1", "::1")

logger = logging.getLogger(__name__)


class HttpReward(ExternalReward):
    """Posts prompts and images as JSON to a URL and reads rewards, as `_external` describes.

    Not differentiable; the range is what the user states, unbounded otherwise. Connection errors,
    time-outs and answers of 500 and above are tried again, with growing pauses; everything else is
    an error at once. Redirects are not followed. The environment's proxies are used, except for
    addresses of this machine.
    """

    def __init__(
        self,
        url: str,
        name: str = "http",
        timeout: float = 60.0,
        retries: int = 3,
        batch_size: int = 16,
        range: Sequence[float] = UNBOUNDED,
    ) -> None:
        """Check the address; nothing is sent yet.

        Args:
            url: `http://` or `https://` address that takes the POST.
            name: name in reports.
            timeout: seconds that one attempt may take, reply included.
            retries: attempts after the first.
            batch_size: images per request.
            range: smallest and largest score.

        Raises:
            InputError: for another kind of address, or an option out of range.
        """
        super().__init__(name, timeout=timeout, batch_size=batch_size, range=range)
        if retries < 0:
            raise InputError(f"reward {name}: retries must be at least 0, got {retries}")
        host = _check_url(name, url)
        self.url, self.retries = url, retries
        own = [urllib.request.ProxyHandler({})] if host in LOOPBACK else []
        self._opener = urllib.request.build_opener(_NoRedirect, *own)

    def _ask(self, request: bytes) -> bytes:
        """Post until there is an answer or no attempt left."""
        pause, left = FIRST_PAUSE, self.retries
        while True:
            try:
                return self._post(request)
            except _TemporaryError as error:
                if not left:
                    tries = self.retries + 1
                    raise self._failure(f"{self.url} {error} ({tries} attempts)") from error
                logger.warning("reward %s: %s %s; trying again", self.name, self.url, error)
            time.sleep(pause)
            pause, left = min(2 * pause, LONGEST_PAUSE), left - 1

    def _post(self, body: bytes) -> bytes:
        deadline = time.monotonic() + self.timeout
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        request = urllib.request.Request(self.url, body, headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                return self._read(response, deadline)
        except urllib.error.HTTPError as error:
            error.close()
            status = f"answers {error.code} {error.reason}"
            if error.code >= 500:
                raise _TemporaryError(status) from error
            hint = "; redirects are not followed" if 300 <= error.code < 400 else ""
            raise self._failure(f"{self.url} {status}{hint}") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _TemporaryError(f"gives no answer within {self.timeout:g} s") from error
            raise _TemporaryError(f"cannot be reached: {reason or type(error).__name__}") from error

    def _read(self, response: Any, deadline: float) -> bytes:
        """Read a reply that may be endless or drip in byte by byte."""
        stream: IO[bytes] = response
        parts: list[bytes] = []
        size = 0
        while part := stream.read1(CHUNK):  # type: ignore[attr-defined]
            parts.append(part)
            size += len(part)
            if size > MAX_REPLY_BYTES:
                raise self._failure(f"its reply is longer than {MAX_REPLY_BYTES} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError
        return b"".join(parts)


class _TemporaryError(Exception):
    """A failure that may be gone at the next attempt; the message is a predicate of the URL."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect as the error it is: a scorer may not send pictures elsewhere."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _check_url(name: str, url: str) -> str:
    """Return the host of an address that can be asked."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise InputError(f"reward {name}: url {url!r}: {error}") from error
    if "@" in parts.netloc:
        raise InputError(f"reward {name}: a user name or password in the url is not supported")
    clean = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in ("http", "https") or not host or not clean:
        raise InputError(f"reward {name}: url {url!r} is not a plain http:// or https:// address")
    return host
