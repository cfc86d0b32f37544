"""A reward as a Starlette application: the server side of `mmalign.rewards._external`.

Requests are a stranger's: bodies, samples and pixels are bounded, JSON is the only format, images
are decoded by the same code as files of strangers, and no more requests are held than `queue`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.responses import Response as Reply
from starlette.routing import Route
from torch import Tensor

from mmalign.data.images import check_header, decode, to_tensor
from mmalign.data.schema import RowError
from mmalign.pipelines._label_app import is_loopback
from mmalign.pipelines._lingering import Lingering
from mmalign.scoring import BatchedReward, ScorerError
from mmalign.types import ImageRef, InputError, Response

if TYPE_CHECKING:
    from mmalign.config import ServeRewardConfig
    from mmalign.types import Reward, TextReward

MIB = 2**20
BODY_SECONDS = 60.0
"""How long a request may take to arrive."""
HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}

Sample = Tensor | Response
Kind = type[str] | type[list[Any]] | type[dict[str, Any]]
_KINDS: dict[Kind, str] = {str: "texts", list: "lists", dict: "objects"}


class Task(NamedTuple):
    """A request that was read: its samples, and who waits for their scores."""

    samples: Sequence[Sample]
    prompts: list[str]
    scores: asyncio.Future[list[float]]


@dataclass
class Counts:
    """What the server is doing and has done."""

    waiting: int = 0
    requests: int = 0
    samples: int = 0
    refused: int = 0


def make_app(
    reward: Reward | TextReward,
    config: ServeRewardConfig,
    *,
    token: str | None,
    local_only: bool,
    device: str,
) -> Lingering:
    """Make the application; `POST /` scores, `GET /health` says how it is.

    Args:
        reward: what is served.
        config: bounds of requests, of the queue and of batches.
        token: secret to ask for; none when omitted.
        local_only: answer only requests that name this machine as `localhost` or a loopback
            address, so that no web site can point its own name here.
        device: where images are moved before they are scored.
    """
    server = _Server(reward, config, token, local_only, device)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker = asyncio.create_task(server.work())
        try:
            yield
        finally:
            worker.cancel()

    app = Starlette(
        routes=[
            Route("/", server.score, methods=["POST"]),
            Route("/health", server.health),
        ],
        exception_handlers={HTTPException: _refusal},
        lifespan=lifespan,
    )
    return Lingering(app, BODY_SECONDS)


class _Server:
    def __init__(
        self,
        reward: Reward | TextReward,
        config: ServeRewardConfig,
        token: str | None,
        local_only: bool,
        device: str,
    ) -> None:
        self.reward, self.config, self.counts = reward, config, Counts()
        self._token, self._local_only, self._device = token, local_only, device
        self._batched = BatchedReward(reward, config.batch_size)
        # Where a score depends on the other samples of a call, strangers' samples stay apart.
        self._merges = getattr(reward, "fingerprint", "") is not None
        self._tasks: asyncio.Queue[Task] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, "reward")  # one batch at a time, as memory wants it

    async def health(self, request: Request) -> Reply:
        """Say what is served and how busy it is."""
        self._check_host(request)
        low, high = (end if math.isfinite(end) else None for end in self.reward.range)
        return _json(
            {
                "reward": self.reward.name,
                "modality": self.reward.modality,
                "range": [low, high],
                "differentiable": False,
                **vars(self.counts),
            }
        )

    async def score(self, request: Request) -> Reply:
        """Read a request, wait for its turn, answer with its scores."""
        self._check(request)
        if self.counts.waiting >= self.config.queue:
            self.counts.refused += 1
            raise _busy()
        self.counts.waiting += 1
        try:
            body = await self._read(request)
            samples, prompts = await run_in_threadpool(_parse, body, self.reward, self.config)
            del body
            future: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
            self._tasks.put_nowait(Task(samples, prompts, future))
            scores = await future
        except InputError as error:
            status = 502 if isinstance(error, ScorerError) else 422
            raise HTTPException(status, str(error)) from error
        finally:
            self.counts.waiting -= 1
        self.counts.requests += 1
        self.counts.samples += len(scores)
        return _json({"rewards": scores})

    async def work(self) -> None:
        """Score what waits, as many requests at once as fit a batch, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            tasks = [await self._tasks.get()]
            size = len(tasks[0].samples)
            while self._merges and size < self.config.batch_size and not self._tasks.empty():
                tasks.append(self._tasks.get_nowait())
                size += len(tasks[-1].samples)
            outcomes = await loop.run_in_executor(self._thread, self._outcomes, tasks)
            for task, outcome in zip(tasks, outcomes, strict=True):
                if task.scores.done():  # who asked has gone away
                    continue
                if isinstance(outcome, Exception):
                    task.scores.set_exception(outcome)
                else:
                    task.scores.set_result(outcome)

    def _outcomes(self, tasks: Sequence[Task]) -> list[list[float] | Exception]:
        """Score tasks together, or each by itself when that fails: not all need fail with one."""
        try:
            samples = [sample for task in tasks for sample in task.samples]
            prompts = [prompt for task in tasks for prompt in task.prompts]
            names = [f"sample {i}" for task in tasks for i in range(len(task.samples))]
            scores = self._scores(samples, prompts, names)
        except Exception as error:
            if len(tasks) == 1:
                return [error]
            return [outcome for task in tasks for outcome in self._outcomes([task])]
        ends = [0]
        for task in tasks:
            ends.append(ends[-1] + len(task.samples))
        return [scores[start:stop] for start, stop in pairwise(ends)]

    @torch.no_grad()
    def _scores(
        self, samples: Sequence[Sample], prompts: Sequence[str], names: Sequence[str]
    ) -> list[float]:
        """Score samples, those of one shape together."""
        groups: dict[tuple[int, ...] | None, list[int]] = {}
        for index, sample in enumerate(samples):
            shape = tuple(sample.shape) if isinstance(sample, Tensor) else None
            groups.setdefault(shape, []).append(index)
        scores = [0.0] * len(samples)
        for shape, rows in groups.items():
            chosen: Any = [samples[row] for row in rows]
            if shape is not None:
                chosen = torch.stack(chosen).to(self._device)
            asked, called = [prompts[row] for row in rows], [names[row] for row in rows]
            found = self._batched(chosen, asked, called).tolist()
            for row, score in zip(rows, found, strict=True):
                scores[row] = float(score)
        return scores

    def _check_host(self, request: Request) -> None:
        host = request.headers.get("host", "").rpartition(":")[0] or request.headers.get("host", "")
        if self._local_only and not is_loopback(host.strip("[]")):
            raise HTTPException(403, "this server answers to localhost only")

    def _check(self, request: Request) -> None:
        self._check_host(request)
        kind, _, secret = request.headers.get("authorization", "").partition(" ")
        if self._token is not None and not (
            kind.lower() == "bearer"
            and hmac.compare_digest(secret.strip().encode(), self._token.encode())
        ):
            raise HTTPException(401, "a token is needed: set token_env of the reward")
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise HTTPException(415, "the request must be application/json")

    async def _read(self, request: Request) -> bytearray:
        most, body = self.config.max_body_mib * MIB, bytearray()
        too_large = HTTPException(413, f"the request has more than {most} bytes")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > most:
            raise too_large
        try:
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise too_large
        except ClientDisconnect as error:
            raise HTTPException(408, "the rest of the request did not come") from error
        return body


def _parse(
    body: bytearray, reward: Reward | TextReward, config: ServeRewardConfig
) -> tuple[list[Sample], list[str]]:
    """Read samples and prompts.

    Raises:
        InputError: saying what is wrong, and with which sample.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise InputError("the request is not JSON") from None
    if not isinstance(content, dict):
        raise InputError("the request is not a JSON object")
    prompts = _list(content, "prompts", str)
    if not 1 <= len(prompts) <= config.max_samples:
        raise InputError(f"{len(prompts)} samples: send 1 to {config.max_samples} at a time")
    read = _read_images if reward.modality == "image" else _read_responses
    samples = read(content, config.max_pixels)
    if len(samples) != len(prompts):
        raise InputError(f"{len(samples)} samples for {len(prompts)} prompts")
    return samples, prompts


def _read_images(content: Mapping[str, Any], max_pixels: int) -> list[Sample]:
    if "responses" in content:
        raise InputError("this reward scores images, not answers")
    samples: list[Sample] = []
    for index, text in enumerate(_list(content, "images", str)):
        ref = _image(text, f"sample {index}")
        try:
            samples.append(to_tensor(decode(ref, max_pixels)))
        except RowError as error:
            raise InputError(f"{ref.where}: {error}") from error
    return samples


def _read_responses(content: Mapping[str, Any], max_pixels: int) -> list[Sample]:
    texts = _list(content, "responses", str)
    images = _list(content, "images", list) if "images" in content else [[] for _ in texts]
    fields = _list(content, "fields", dict) if "fields" in content else [{} for _ in texts]
    if not len(texts) == len(images) == len(fields):
        raise InputError(f"{len(texts)} responses, {len(images)} images, {len(fields)} fields")
    samples: list[Sample] = []
    for index, (text, shown, known) in enumerate(zip(texts, images, fields, strict=True)):
        where = f"sample {index}"
        if not all(isinstance(image, str) for image in shown):
            raise InputError(f"{where}: its images are not texts in base64")
        refs = tuple(_image(image, where) for image in shown)
        try:
            for ref in refs:
                check_header(ref, max_pixels)
        except RowError as error:
            raise InputError(f"{where}: {error}") from error
        samples.append(Response(text=text, images=refs, fields=known))
    return samples


def _image(text: str, where: str) -> ImageRef:
    try:
        return ImageRef(base64.b64decode(text, validate=True), where)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{where}: the image is not base64") from error


def _list(content: Mapping[str, Any], name: str, kind: Kind) -> list[Any]:
    value = content.get(name)
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise InputError(f'"{name}" of the request is not a list of {_KINDS[kind]}')
    return value


def _busy() -> HTTPException:
    return HTTPException(503, "too many requests are waiting", headers={"Retry-After": "1"})


def _json(content: Mapping[str, Any], status: int = 200) -> Reply:
    return JSONResponse(content, status_code=status, headers=HEADERS)


def _refusal(request: Request, error: Exception) -> Reply:
    assert isinstance(error, HTTPException)
    headers = {**HEADERS, **(error.headers or {})}
    return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=headers)
