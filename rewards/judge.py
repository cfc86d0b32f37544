"""A vision-language model behind a server as the judge of answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmalign.rewards._judged import JudgedReward, Rating

TEMPLATE = """\
You see what a person asked about {images}, and the answer that an assistant gave.

Question: {question}
Answer: {response}

Rate the answer from 1 to 10. What counts first is that everything it says is true of what can be \
seen: take points off for every object, attribute, number or relation that is not there. Then \
count how fully it answers the question. Its length and tone do not count.
Give your reasons in at most three sentences, then end with a line "Score: N"."""


class JudgeReward(JudgedReward):
    """A rating by any model behind an OpenAI-compatible server that is shown the image.

        r = the N of the judge's last "Score: N"

    A reply without one is asked for again, with a little temperature, up to `attempts` times. The
    same model as judge in training and in evaluation measures only itself: take another.
    """

    def __init__(
        self,
        endpoint: Mapping[str, Any],
        template: str = TEMPLATE,
        low: float = 1.0,
        high: float = 10.0,
        attempts: int = 3,
        images: bool = True,
    ) -> None:
        """Check the options; nothing is sent yet.

        Args:
            endpoint: options of `mmalign.config.EndpointConfig`, such as `url` and `model_name`.
            template: what the judge is told, with `{question}` and `{response}`.
            low: lowest rating.
            high: highest rating.
            attempts: how often the judge is asked until its reply can be read.
            images: show the judge the images; otherwise it knows the texts alone.

        Raises:
            InputError: for a missing or unusable address, or an option out of range.
        """
        shown = "the image" if images else "an image that you do not see"
        super().__init__(
            "judge",
            endpoint,
            Rating(
                template=template.replace("{images}", shown),
                low=low,
                high=high,
                attempts=attempts,
                shows_images=images,
            ),
        )
