"""JSON posted to a URL: tried again when that may help, bounded in time and size."""

from __future__ import annotations

import http.client
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping
from typing import IO, Any
from urllib.parse import urlsplit

from mmalign.types import InputError

FIRST_PAUSE = 0.5
"""Seconds before the first new attempt; doubled before each further one."""
LONGEST_PAUSE = 30.0
TOO_BUSY = (429, 503)
"""Statuses with which a server that names a `Retry-After` asks for patience."""
MAX_REPLY_BYTES = 2**20
CHUNK = 2**16
EXCERPT_BYTES = 2000
LOOPBACK = ("localhost", "127.0.0.1", "::1")

logger = logging.getLogger(__name__)


class EndpointError(InputError):
    """A server gave no usable answer; the message is whole.

    `index` is the number of the question of a batch that failed, where there is one.
    """

    index: int | None = None


class JsonClient:
    """Posts JSON to one URL.

    Connection errors, time-outs and answers of 500 and above are tried again, with growing pauses;
    everything else is an error at once. A server that says with 429 or 503 when to come back
    (`Retry-After` in seconds) is asked then, which does not count as an attempt while `patience`
    lasts. Redirects are not followed. The environment's proxies are used, except for addresses of
    this machine. May be called from several threads.
    """

    def __init__(
        self,
        url: str,
        *,
        label: str,
        timeout: float = 60.0,
        retries: int = 3,
        headers: Mapping[str, str] | None = None,
        retry_statuses: Collection[int] = (),
        patience: float = 0.0,
    ) -> None:
        """Check the address; nothing is sent yet.

        Args:
            url: `http://` or `https://` address that takes the POST.
            label: what messages begin with.
            timeout: seconds that one attempt may take, reply included.
            retries: attempts after the first.
            headers: sent besides those of JSON.
            retry_statuses: answers below 500 that are tried again as well.
            patience: seconds that a server which says it is busy is waited for, beyond attempts.

        Raises:
            InputError: for another kind of address, or an option out of range.
        """
        if not timeout > 0:
            raise InputError(f"{label}: timeout must be positive, got {timeout:g}")
        if retries < 0:
            raise InputError(f"{label}: retries must be at least 0, got {retries}")
        host = _check_url(label, url)
        self.url, self.label, self.timeout, self.retries = url, label, float(timeout), retries
        self.patience = patience
        self._retry_statuses = frozenset(retry_statuses)
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        self._headers.update(headers or {})
        own = [urllib.request.ProxyHandler({})] if host in LOOPBACK else []
        self._opener = urllib.request.build_opener(_NoRedirect, *own)

    def post(self, body: bytes) -> bytes:
        """Post until there is an answer or no attempt left; at most `MAX_REPLY_BYTES` return.

        Raises:
            EndpointError: there is no answer, or one that says no.
        """
        pause, left = FIRST_PAUSE, self.retries
        patient_until = time.monotonic() + self.patience
        while True:
            try:
                return self._post(body)
            except _TemporaryError as error:
                busy = error.wait is not None and time.monotonic() + error.wait < patient_until
                if not left and not busy:
                    tries = self.retries + 1
                    raise self.failure(f"{self.url} {error} ({tries} attempts)") from error
                logger.log(
                    logging.INFO if busy else logging.WARNING,
                    "%s: %s %s; trying again",
                    *(self.label, self.url, error),
                )
                wait = error.wait
            time.sleep(pause if wait is None else wait)
            if not busy:
                pause, left = min(2 * pause, LONGEST_PAUSE), left - 1

    def failure(self, problem: str) -> EndpointError:
        """Make the error of this client that says what is wrong."""
        return EndpointError(f"{self.label}: {problem}")

    def _post(self, body: bytes) -> bytes:
        deadline = time.monotonic() + self.timeout
        request = urllib.request.Request(self.url, body, self._headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                return self._read(response, deadline)
        except urllib.error.HTTPError as error:
            status = f"answers {error.code} {error.reason}"
            said = _said(error)
            wait = _retry_after(error)
            if error.code >= 500 or error.code in self._retry_statuses or wait is not None:
                raise _TemporaryError(status + said, wait) from error
            hint = "; redirects are not followed" if 300 <= error.code < 400 else ""
            raise self.failure(f"{self.url} {status}{said}{hint}") from error
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
                raise self.failure(f"its reply is longer than {MAX_REPLY_BYTES} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError
        return b"".join(parts)


class _TemporaryError(Exception):
    """A failure that may be gone at the next attempt; the message is a predicate of the URL.

    `wait` are the seconds after which the server wants to be asked again.
    """

    def __init__(self, problem: str, wait: float | None = None) -> None:
        super().__init__(problem)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect as the error it is: a server may not send pictures elsewhere."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def excerpt(reply: bytes) -> str:
    """Show the beginning of a reply on one line."""
    text = " ".join(reply[:400].decode("utf-8", "replace").split())
    return repr(text[:80]) if text else "it is empty"


def _said(error: urllib.error.HTTPError) -> str:
    """Quote what a refusal says about itself, and close it."""
    stream: Any = error
    with error:
        try:
            body: bytes = stream.read1(EXCERPT_BYTES)  # once: what drips is not waited for
        except (OSError, ValueError, http.client.HTTPException):
            return ""
    return f": {_reason(body)}" if body.strip() else ""


def _reason(body: bytes) -> str:
    """Take the text of `{"error": "text"}`, or of `{"error": {"message": "text"}}`."""
    try:
        content = json.loads(body)
        found = content["error"]
        text = found["message"] if isinstance(found, dict) else found
    except (ValueError, KeyError, TypeError, RecursionError):
        return excerpt(body)
    return " ".join(text.split())[:300] if isinstance(text, str) else excerpt(body)


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    """Read the seconds that a busy server asks to wait; a date, or nonsense, says nothing."""
    value = error.headers.get("Retry-After", "").strip()
    if error.code not in TOO_BUSY or not (value.isascii() and value.isdecimal()):
        return None
    return min(float(value[:6]), LONGEST_PAUSE)


def bearer(variable: str | None, label: str) -> dict[str, str]:
    """Make the header that shows a server the secret in an environment variable; none without one.

    Raises:
        InputError: naming the option `label`, if the variable holds nothing that can be sent.
    """
    if variable is None:
        return {}
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise InputError(f"{label}: the environment variable {variable} has no key")
    return {"Authorization": f"Bearer {key}"}


def _check_url(label: str, url: str) -> str:
    """Return the host of an address that can be asked."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise InputError(f"{label}: url {url!r}: {error}") from error
    if "@" in parts.netloc:
        raise InputError(f"{label}: a user name or password in the url is not supported")
    clean = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in ("http", "https") or not host or not clean:
        raise InputError(f"{label}: url {url!r} is not a plain http:// or https:// address")
    return host
