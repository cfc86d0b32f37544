"""Any OpenAI-compatible server as a model that is asked about images.

`POST <url>/chat/completions`, one request per question, several at a time. A reply is a stranger's:
it is bounded in size, read as JSON and nothing else, and checked.
"""

from __future__ import annotations

import base64
import io
import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from mmalign.data.images import image_suffix, open_image, read_image_bytes
from mmalign.endpoint import EndpointError, JsonClient, bearer, excerpt
from mmalign.randomness import derive_seed
from mmalign.types import ImageRef, InputError

if TYPE_CHECKING:
    from PIL import Image

    from mmalign.config import EndpointConfig, GenerationConfig
    from mmalign.types import Question

BUSY = (408, 409, 425, 429)
"""Statuses that ask to come back later, as servers of language models give them."""
TOP_LOGPROBS = 20
MAX_PIXELS = 50_000_000
SENT_AS_THEY_ARE = {".jpg": "jpeg", ".png": "png", ".webp": "webp"}
LARGEST_SEED = 2**31

Answer = TypeVar("Answer")


class ChatEndpoint:
    """Asks a server; takes the place of a local model wherever text is generated or judged.

    `fingerprint` names address, model, extra fields and revision, for cache keys. The key of the
    server, if it wants one, is read from an environment variable and stands in no file.
    """

    def __init__(self, config: EndpointConfig) -> None:
        """Check the options; nothing is sent yet.

        Raises:
            InputError: for a missing or unusable address, model, or environment variable.
        """
        if not config.url or not config.model_name:
            raise InputError(
                "endpoint: url and model_name are required, such as http://host:8000/v1"
            )
        if config.concurrency < 1:
            raise InputError(f"endpoint: concurrency must be at least 1, got {config.concurrency}")
        self.config = config
        known = [config.url, config.model_name, config.extra]
        revision = [] if config.revision is None else [config.revision]
        self.fingerprint = json.dumps([*known, *revision], sort_keys=True)
        self._client = JsonClient(
            f"{config.url.rstrip('/')}/chat/completions",
            label=f"endpoint {config.model_name}",
            timeout=config.timeout,
            retries=config.retries,
            headers=bearer(config.api_key_env, "endpoint.api_key_env"),
            retry_statuses=BUSY,
        )

    def generate(self, questions: Sequence[Question], config: GenerationConfig) -> list[str]:
        """Answer each question; its seed depends on it alone and how often it came before.

        Raises:
            EndpointError: with the `index` of the question that has no usable answer.
            InputError: if beams are asked for, which such servers do not offer.
        """
        if config.num_beams != 1:
            raise InputError("endpoint: num_beams must be 1, servers offer no beam search")

        seeds, pictures = _seeds(questions, config.seed), _Pictures(self.config.concurrency)

        def ask(index: int, question: Question) -> str:
            return self._text(
                {
                    "messages": _messages(question, pictures),
                    "max_tokens": config.max_new_tokens,
                    "temperature": config.temperature,
                    "top_p": config.top_p,
                    "seed": seeds[index],
                }
            )

        return self._each(ask, questions)

    def yes_no(self, questions: Sequence[Question], batch_size: int) -> list[tuple[float, float]]:
        """Return (p_yes, p_no) of the first token of each answer, variants of case summed.

        A word that is not among the likeliest `TOP_LOGPROBS` tokens counts as probability 0.
        `batch_size` is how local models are asked; here `concurrency` decides.

        Raises:
            EndpointError: with the `index` of the question that has no usable answer.
        """
        pictures = _Pictures(self.config.concurrency)

        def ask(index: int, question: Question) -> tuple[float, float]:
            return self._yes_no(
                {
                    "messages": _messages(question, pictures),
                    "max_tokens": 1,
                    "temperature": 0.0,
                    "logprobs": True,
                    "top_logprobs": TOP_LOGPROBS,
                }
            )

        return self._each(ask, questions)

    def _each(
        self, ask: Callable[[int, Question], Answer], questions: Sequence[Question]
    ) -> list[Answer]:
        def numbered(index: int) -> Answer:
            try:
                return ask(index, questions[index])
            except EndpointError as error:
                error.index = index
                raise

        with ThreadPoolExecutor(self.config.concurrency) as pool:
            futures = [pool.submit(numbered, index) for index in range(len(questions))]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _text(self, body: Mapping[str, Any]) -> str:
        reply, choice = self._choice(body)
        message = choice.get("message")
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str):
            raise self._client.failure(f"its reply has no text: {excerpt(reply)}")
        return content.strip()

    def _yes_no(self, body: Mapping[str, Any]) -> tuple[float, float]:
        reply, choice = self._choice(body)
        try:
            entries = choice["logprobs"]["content"][0]["top_logprobs"]
            words = [(str(e["token"]).strip().lower(), float(e["logprob"])) for e in entries]
        except (KeyError, IndexError, TypeError, ValueError):
            raise self._client.failure(
                f"its reply has no top_logprobs, without which nothing can be judged: "
                f"{excerpt(reply)}"
            ) from None
        yes, no = (
            sum(math.exp(min(value, 0.0)) for word, value in words if word == wanted)
            for wanted in ("yes", "no")
        )
        if not math.isfinite(yes + no):
            raise self._client.failure(f"its logprobs are not numbers: {excerpt(reply)}")
        return min(yes, 1.0), min(no, 1.0)

    def _choice(self, body: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
        request = {"model": self.config.model_name, **body, **self.config.extra}
        reply = self._client.post(json.dumps(request).encode())
        try:
            content = json.loads(reply)
        except (ValueError, RecursionError):
            page = reply.lstrip()[:1] == b"<"
            kind = "an HTML page, not JSON" if page else "not JSON, or was cut off"
            problem = f"its reply is {kind}: {excerpt(reply)}"
            raise self._client.failure(problem) from None
        choices = content.get("choices") if isinstance(content, dict) else None
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise self._client.failure(f"its reply has no choices: {excerpt(reply)}")
        return reply, choices[0]


def _seeds(questions: Sequence[Question], seed: int) -> list[int]:
    """Give the same question about the same images another seed each time."""
    before: Counter[tuple[Any, ...]] = Counter()
    seeds = []
    for question in questions:
        key = (question.prompt, *map(id, question.images))
        seeds.append(derive_seed(seed, question.prompt, before[key]) % LARGEST_SEED)
        before[key] += 1
    return seeds


class _Pictures:
    """Encodes images, and keeps the last `size` of them: many questions are about the same one."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: dict[int, tuple[Image.Image | ImageRef, str]] = {}
        self._lock = threading.Lock()

    def url(self, image: Image.Image | ImageRef) -> str:
        with self._lock:
            kept = self._kept.get(id(image))
            if kept is not None:
                return kept[1]
            url = _data_url(image)
            self._kept[id(image)] = (image, url)  # the image too, so that its id stays its own
            if len(self._kept) > self._size:
                del self._kept[next(iter(self._kept))]
            return url


def _messages(question: Question, pictures: _Pictures) -> list[dict[str, Any]]:
    if not question.images:
        return [{"role": "user", "content": question.prompt}]
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": pictures.url(image)}}
        for image in question.images
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question.prompt}]}]


def _data_url(image: Image.Image | ImageRef) -> str:
    """Encode an image; files of formats that every server reads go as they are."""
    if isinstance(image, ImageRef):
        kind = SENT_AS_THEY_ARE.get(image_suffix(image, MAX_PIXELS))
        if kind is not None:
            return _base64(read_image_bytes(image), kind)
        image = open_image(image, max_pixels=MAX_PIXELS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return _base64(buffer.getvalue(), "png")


def _base64(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
