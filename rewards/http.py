"""A scorer behind a URL as a reward."""

from __future__ import annotations

from collections.abc import Sequence

from mmalign.endpoint import EndpointError, JsonClient
from mmalign.rewards._external import UNBOUNDED, ExternalReward
from mmalign.scoring import ScorerError


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
        self._client = JsonClient(url, label=f"reward {name}", timeout=timeout, retries=retries)

    def _ask(self, request: bytes) -> bytes:
        """Post until there is an answer or no attempt left."""
        try:
            return self._client.post(request)
        except EndpointError as error:
            raise ScorerError(str(error)) from error
