"""The page of `mmalign pairs label` as a Starlette application.

Nothing of a request reaches a path or a query as text: images are found by their hash in the
database, names and hashes are checked, and the page shows prompts as text only.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import re
from collections.abc import Mapping
from functools import cache, partial
from importlib.resources import files
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
)
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmalign.data.files import check_inside
from mmalign.data.images import decode, image_suffix
from mmalign.data.labels import Labels, LabelsUnavailableError, Shown, UnknownPairError, check_name
from mmalign.data.schema import RowError, content_hash
from mmalign.pipelines._lingering import Lingering
from mmalign.types import ImageRef, InputError

MAX_BODY = 4096
BODY_SECONDS = 60.0
"""How long a request may take to arrive."""
PRELOADED = 3
MARK = "x-mmalign"
"""A header that a form or link of another site cannot send."""
ASSETS = {"label.js": "text/javascript", "label.css": "text/css", "colors.css": "text/css"}
SHOWN_AS_IS = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class TooLargeError(InputError):
    """The body of a request is larger than any that the page sends."""


def make_app(
    labels: Labels,
    root: Path,
    *,
    token: str | None,
    local_only: bool,
    max_pixels: int,
    blind: bool = False,
) -> Lingering:
    """Make the application.

    Args:
        labels: the pairs to judge.
        root: folder of the images.
        token: secret to ask for; none when omitted.
        local_only: answer only requests that name this machine as `localhost` or a loopback
            address, so that no web site can point its own name here.
        max_pixels: larger images are not decoded.
        blind: the answers are for a comparison of models, not for pairs to train on.
    """
    pages = _Pages(labels, root, max_pixels, blind)
    app = Starlette(
        routes=[
            Route("/", pages.index),
            *(Route(f"/{name}", partial(_asset, name)) for name in ASSETS),
            Route("/state", pages.state),
            Route("/judge", pages.judge, methods=["POST"]),
            Route("/undo", pages.undo, methods=["POST"]),
            Route("/images/{hash}", pages.image),
        ],
        exception_handlers={
            LabelsUnavailableError: _unavailable,
            UnknownPairError: partial(_problem, 404),
            TooLargeError: partial(_problem, 413),
            InputError: partial(_problem, 400),
            ClientDisconnect: _cut_off,
        },
    )
    return Lingering(Guard(app, token=token, local_only=local_only), BODY_SECONDS)


def is_loopback(host: str) -> bool:
    """Tell whether a host name means this machine and cannot be reached from others."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Lets through only requests of the page itself, by somebody who knows the token."""

    def __init__(self, app: ASGIApp, *, token: str | None, local_only: bool) -> None:
        """Guard an application; without a token everybody may come."""
        self.app, self._local_only = app, local_only
        # What the browser keeps is derived from the token, and has no characters a cookie lacks.
        self._secret = None if token is None else _digest(token)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            return
        request = Request(scope)
        answer = self._refusal(request) or self._admission(request) or self.app

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await answer(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        if self._local_only and not is_loopback(_host_name(host)):
            return _text(403, "this page answers only to localhost")
        if self._secret is not None and not self._knows_token(request):
            return _text(401, "open the address with the token that mmalign pairs label printed")
        if request.method == "POST":
            origin = request.headers.get("origin")
            foreign = origin is not None and urlsplit(origin).netloc != host
            if foreign or MARK not in request.headers:
                return _text(403, "this request does not come from the page")
        return None

    def _knows_token(self, request: Request) -> bool:
        kind, _, bearer = request.headers.get("authorization", "").partition(" ")
        given = [request.cookies.get(_cookie(request), "")]
        given += [_digest(bearer)] if kind.lower() == "bearer" else []
        if request.scope["path"] == "/" and "token" in request.query_params:
            given.append(_digest(request.query_params["token"]))
        secret = (self._secret or "").encode()
        return any(hmac.compare_digest(one.encode(), secret) for one in given)

    def _admission(self, request: Request) -> Response | None:
        """Swap a token in the address for a cookie, so that it does not stay in the history."""
        if (
            self._secret is None
            or request.scope["path"] != "/"
            or "token" not in request.query_params
        ):
            return None
        answer = RedirectResponse("/", status_code=303)
        answer.set_cookie(_cookie(request), self._secret, httponly=True, samesite="lax")
        return answer


class _Pages:
    def __init__(self, labels: Labels, root: Path, max_pixels: int, blind: bool) -> None:
        self.labels, self.root, self.max_pixels, self.blind = labels, root, max_pixels, blind

    def index(self, request: Request) -> Response:
        page = _environment().get_template("label.html.j2")
        return HTMLResponse(page.render(folder=self.root.resolve().name, blind=self.blind))

    def state(self, request: Request) -> Response:
        return self._state(check_name(request.query_params.get("annotator", "")))

    async def judge(self, request: Request) -> Response:
        fields = await _fields(request, "annotator", "pair", "winner")
        return await run_in_threadpool(self._judge, fields)

    async def undo(self, request: Request) -> Response:
        fields = await _fields(request, "annotator", "pair")
        return await run_in_threadpool(self._undo, fields)

    def image(self, request: Request) -> Response:
        key = request.path_params["hash"]
        name = self.labels.path(key) if _is_hash(key) else None
        if name is None:
            return _text(404, "there is no such image")
        try:
            data = check_inside(self.root, self.root / name).read_bytes()
            if content_hash(data).hex() != key:
                raise RowError("the image has changed")
            return _image_response(data, self.max_pixels)
        except (RowError, InputError, OSError):
            self.labels.unlist(key)
            return _text(410, "the image is missing or has changed; its pairs are left out")

    def _judge(self, fields: Mapping[str, str | None]) -> Response:
        annotator = check_name(fields["annotator"] or "")
        self.labels.judge(annotator, _hash(fields["pair"]), fields["winner"])
        return self._state(annotator)

    def _undo(self, fields: Mapping[str, str | None]) -> Response:
        annotator = check_name(fields["annotator"] or "")
        return self._state(annotator, self.labels.undo(annotator, _hash(fields["pair"])))

    def _state(self, annotator: str, current: Shown | None = None) -> Response:
        following = self.labels.next_pairs(annotator, PRELOADED)
        if current is not None:
            following = [current, *(pair for pair in following if pair.key != current.key)]
        shown = [pair._asdict() for pair in following]
        return JSONResponse(
            {
                "annotator": annotator,
                "pair": shown[0] if shown else None,
                "upcoming": [side for pair in following[1:] for side in (pair.left, pair.right)],
                "last": self.labels.last(annotator),
                "progress": self.labels.progress(annotator)._asdict(),
                "agreement": self.labels.agreement()._asdict(),
            }
        )


async def _fields(request: Request, *names: str) -> dict[str, str | None]:
    """Read the fields of a small JSON body.

    Raises:
        InputError: if it is too large, not JSON, or a field is missing or neither text nor null.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise TooLargeError(f"the request has more than {MAX_BODY} bytes")
    try:
        record = json.loads(body)
        fields = {name: record[name] for name in names}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"the request must be JSON with {', '.join(names)}") from error
    if not all(value is None or isinstance(value, str) for value in fields.values()):
        raise InputError("every field must be a text or null")
    return fields


def _image_response(data: bytes, max_pixels: int) -> Response:
    """Send the file as it is where browsers show it, else as PNG."""
    ref = ImageRef(data, "image")
    kind = SHOWN_AS_IS.get(image_suffix(ref, max_pixels))
    if kind is None:
        buffer = io.BytesIO()
        decode(ref, max_pixels).save(buffer, "PNG")
        data, kind = buffer.getvalue(), "image/png"
    # The address is the hash of the content, which therefore never changes.
    headers = {"cache-control": "private, max-age=31536000, immutable"}
    return Response(data, media_type=kind, headers=headers)


def _asset(name: str, request: Request) -> Response:
    return Response(_asset_bytes(name), media_type=ASSETS[name])


@cache
def _asset_bytes(name: str) -> bytes:
    return (files("mmalign") / "templates" / name).read_bytes()


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("mmalign", "templates"), autoescape=True, undefined=StrictUndefined
    )


def _problem(status: int, request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=status)


def _cut_off(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "the rest of the request did not come"}, status_code=408)


def _unavailable(request: Request, error: Exception) -> Response:
    """Say why without saying where the file is: people elsewhere read this."""
    reason = error.__cause__ or error
    return JSONResponse({"error": f"The judgements cannot be saved now: {reason}"}, status_code=503)


def _text(status: int, message: str) -> Response:
    return PlainTextResponse(message + "\n", status_code=status)


def _hash(value: str | None) -> str:
    if value is None or not _is_hash(value):
        raise UnknownPairError("there is no such pair")
    return value


def _is_hash(value: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{32}", value) is not None


def _host_name(host: str) -> str:
    """Take the port and the brackets of IPv6 off a Host header."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _cookie(request: Request) -> str:
    """Name the cookie after the port: browsers share cookies between the ports of a host."""
    return f"mmalign-{request.scope['server'][1]}"


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
