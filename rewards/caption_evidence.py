"""A language model that rates answers by a detailed caption instead of the image.

Zhang et al. 2024, "Direct preference optimization of video large multimodal models from language
model reward" (LLaVA-Hound), arXiv 2404.01258, section 3: a text model reads a caption as evidence,
which costs a fraction of showing it the frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmalign.rewards._judged import JudgedReward, Rating
from mmalign.types import InputError, Response

CAPTIONS = ("captions", "caption")
REFERENCES = ("reference", "answer")
TEMPLATE = """\
You judge an answer about an image or a video that you do not see. Instead you have a description \
of it, which is true but may leave things out, and where there is one a reference answer.

Description: {caption}
Question: {question}
Reference answer: {reference}
Answer to judge: {response}

Rate the answer from 1 to 5: 5 when it answers the question and the description supports all that \
it says; 3 when it is right in the main point but says something that the description does not \
support; 1 when it contradicts the description. What the description merely does not mention is a \
fault only where the answer is sure of it.
Give your reasons in at most three sentences, then end with a line "Score: N"."""


class CaptionEvidenceReward(JudgedReward):
    """A rating of 1 to 5 by a text model that reads a caption as evidence.

    The row has the caption in `captions` or `caption` (a text or a list of them), and may have a
    reference answer in `reference` or `answer`. The paper takes answers below 3 for hallucinated.
    The wording is this project's own.
    """

    def __init__(
        self,
        endpoint: Mapping[str, Any],
        template: str = TEMPLATE,
        low: float = 1.0,
        high: float = 5.0,
        attempts: int = 3,
    ) -> None:
        """Check the options; nothing is sent yet.

        Args:
            endpoint: options of `mmalign.config.EndpointConfig`, such as `url` and `model_name`.
            template: what the judge is told, with `{caption}`, `{question}` and `{response}`, and
                `{reference}` for the reference answer or "none".
            low: lowest rating.
            high: highest rating.
            attempts: how often the judge is asked until its reply can be read.

        Raises:
            InputError: for a missing or unusable address, or an option out of range.
        """
        if "{caption}" not in template:
            raise InputError("reward caption_evidence: template has no {caption}")
        rating = Rating(
            template=template, low=low, high=high, attempts=attempts, shows_images=False
        )
        super().__init__("caption_evidence", endpoint, rating)

    def evidence(self, sample: Response) -> dict[str, str]:
        """Return the caption and the reference answer.

        Raises:
            InputError: the row has no caption.
        """
        caption = _text(sample, CAPTIONS)
        if caption is None:
            raise InputError("the row has no captions: what is true of the image, in words")
        return {"caption": caption, "reference": _text(sample, REFERENCES) or "none"}


def _text(sample: Response, names: tuple[str, ...]) -> str | None:
    for name in names:
        value = sample.fields.get(name)
        parts = [part for part in (value if isinstance(value, list) else [value]) if part]
        if parts and all(isinstance(part, str) for part in parts):
            return "\n".join(str(part).strip() for part in parts)
    return None
