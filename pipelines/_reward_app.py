"""A reward as a Starlette application: the server side of `mmalign.rewards._external`.

Requests are a stranger's: bodies, samples and pixels are bounded, JSON is the only format, images
are decoded by the same code as files of strangers, and no more requests are held than `queue`, nor
more pixels of decoded images than `max_total_pixels`, whoever sent them.
"""

from __future__ import annotations

import asyncio
import hmac
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

from mmalign.pipelines._label_app import is_loopback
from mmalign.pipelines._lingering import Lingering
from mmalign.pipelines._reward_request import Asked, Sample, read_request
from mmalign.scoring import BatchedReward, ScorerError, scores_sets
from mmalign.types import InputError

if TYPE_CHECKING:
    from mmalign.config import ServeRewardConfig
    from mmalign.types import Reward, TextReward

MIB = 2**20
BODY_SECONDS = 60.0
"""How long a request may take to arrive."""
HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}


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
        alone = getattr(reward, "fingerprint", "") is None or scores_sets(reward)
        self._merges = not alone
        self._tasks: asyncio.Queue[Task] = asyncio.Queue()
        self._room = _Room(config.max_total_pixels)
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
            asked = await run_in_threadpool(read_request, body, self.reward.modality, self.config)
            del body
            async with self._room.take(asked.pixels):
                scores = await self._scored(asked)
        except InputError as error:
            status = 502 if isinstance(error, ScorerError) else 422
            raise HTTPException(status, str(error)) from error
        finally:
            self.counts.waiting -= 1
        self.counts.requests += 1
        self.counts.samples += len(scores)
        return _json({"rewards": scores})

    async def _scored(self, asked: Asked) -> list[float]:
        """Decode the images of a request, and wait for its turn."""
        samples = await run_in_threadpool(asked.decoded)
        future: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self._tasks.put_nowait(Task(samples, asked.prompts, future))
        return await future

    async def work(self) -> None:
        """Score what waits, as many requests at once as fit a batch, for ever."""
        while True:
            await self._score_some()  # returns without a hold on any sample

    async def _score_some(self) -> None:
        tasks = [await self._tasks.get()]
        size = len(tasks[0].samples)
        while self._merges and size < self.config.batch_size and not self._tasks.empty():
            tasks.append(self._tasks.get_nowait())
            size += len(tasks[-1].samples)
        loop = asyncio.get_running_loop()
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


class _Room:
    """Pixels that may be held at a time; who comes first gets room first."""

    def __init__(self, pixels: int) -> None:
        self._left = pixels
        self._turn, self._freed = asyncio.Lock(), asyncio.Event()

    @asynccontextmanager
    async def take(self, pixels: int) -> AsyncIterator[None]:
        """Wait for room for so many, which may not be more than there is at all."""
        async with self._turn:
            while self._left < pixels:
                self._freed.clear()
                await self._freed.wait()
            self._left -= pixels
        try:
            yield
        finally:
            self._left += pixels
            self._freed.set()


def _busy() -> HTTPException:
    return HTTPException(503, "too many requests are waiting", headers={"Retry-After": "1"})


def _json(content: Mapping[str, Any], status: int = 200) -> Reply:
    return JSONResponse(content, status_code=status, headers=HEADERS)


def _refusal(request: Request, error: Exception) -> Reply:
    assert isinstance(error, HTTPException)
    headers = {**HEADERS, **(error.headers or {})}
    return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=headers)
