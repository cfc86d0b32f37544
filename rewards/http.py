"""A scorer behind a URL as a reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mmalign.endpoint import EndpointError, JsonClient, bearer
from mmalign.rewards._external import UNBOUNDED, ExternalReward
from mmalign.scoring import ScorerError
from mmalign.types import InputError, Modality

PATIENCE = 600.0
"""Seconds that a server which says it is busy is waited for."""


@dataclass(eq=False)
class HttpReward(ExternalReward):
    """Posts prompts and images as JSON to a URL and reads rewards, as `_external` describes.

    Not differentiable, whatever computes the scores. Connection errors, time-outs and answers of
    500 and above are tried again, with growing pauses; a server that says with 429 or 503 when to
    come back is asked then, for up to ten minutes; everything else is an error at once. Redirects
    are not followed. The environment's proxies are used, except for addresses of this machine.

    Attributes:
        url: `http://` or `https://` address that takes the POST; nothing is sent before it is used.
        name: name in reports.
        timeout: seconds that one attempt may take, reply included.
        retries: attempts after the first.
        batch_size: samples per request.
        range: smallest and largest score, as the user states them; unbounded otherwise.
        concurrency: requests under way at a time.
        token_env: environment variable with the secret that the server asks for.
        modality: `image`, or `text` to score answers.
        revision: names what scores behind the URL; only with it are scores kept in a cache.
        scores_sets: whether a sample is scored against the others of its prompt, as `lpips` does: a
            request then holds whole prompts, and no score is kept.

    Raises:
        InputError: for another kind of address, an option out of range, or an environment variable
            without a secret.
    """

    url: str
    name: str = "http"
    timeout: float = 60.0
    retries: int = 3
    batch_size: int = 16
    range: tuple[float, float] = UNBOUNDED
    concurrency: int = 4
    token_env: str | None = None
    modality: Modality = "image"
    revision: str | None = None
    scores_sets: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        super().__init__(
            self.name,
            timeout=self.timeout,
            batch_size=self.batch_size,
            range=self.range,
            modality=self.modality,
            scores_sets=self.scores_sets,
        )
        label = f"reward {self.name}"
        if self.concurrency < 1:
            raise InputError(f"{label}: concurrency must be at least 1, got {self.concurrency}")
        self._client = JsonClient(
            self.url,
            label=label,
            timeout=self.timeout,
            retries=self.retries,
            headers=bearer(self.token_env, f"{label}: token_env"),
            patience=PATIENCE,
        )

    @property
    def fingerprint(self) -> str | None:
        """What a cache of scores takes the server for."""
        return self.revision

    def _each(
        self, score: Callable[[Sequence[int]], list[float]], batches: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Score several batches at a time; the first failure ends what has not begun."""
        if len(batches) < 2 or self.concurrency == 1:
            return super()._each(score, batches)
        with ThreadPoolExecutor(min(self.concurrency, len(batches))) as pool:
            futures = [pool.submit(score, batch) for batch in batches]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, request: bytes) -> bytes:
        """Post until there is an answer or no attempt left."""
        try:
            return self._client.post(request)
        except EndpointError as error:
            raise ScorerError(str(error)) from error
