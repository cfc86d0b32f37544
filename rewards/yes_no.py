"""Yes and no as a reward: against a label, or asked back of a model that sees the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmalign.chat import ChatEndpoint
from mmalign.config import as_path
from mmalign.hallucination.answers import read_yes_no
from mmalign.hallucination.vocabulary import Vocabulary, coco_vocabulary, read_vocabulary
from mmalign.rewards._judged import endpoint_config
from mmalign.types import InputError, Modality, Question, Response

NOTHING_NAMED = 0.5
ASKED = "Is there {object} in the image? Please answer yes or no."


class YesNoReward:
    """Whether an answer agrees with a label, or with what a model says when it is asked.

    Without `endpoint`, the row has a `label` of yes or no:

        r = 1 if the answer says the same, 0 if it says the opposite or neither

    With one, the answer is a description, and a vision-language model behind a server is asked for
    each object that it names whether that is in the image:

        r = mean over objects of p(yes) / (p(yes) + p(no))

    and 0.5 for an answer that names none. It rewards saying what the model stands by when it is
    asked, as RLAIF-V scores claims (Yu et al. 2024, arXiv 2405.17220); the model may be the one
    that is trained.

    Attributes:
        fingerprint: what a cache of scores takes the server for: the endpoint's `revision`; None,
            without one, keeps no scores.
    """

    name = "yes_no"
    modality: Modality = "text"
    differentiable = False
    range = (0.0, 1.0)

    def __init__(
        self,
        endpoint: Mapping[str, Any] | None = None,
        vocabulary: str | None = None,
        question: str = ASKED,
    ) -> None:
        """Choose what answers are compared with.

        Args:
            endpoint: options of `mmalign.config.EndpointConfig`, such as `url` and `model_name`.
            vocabulary: words of objects in the format of CHAIR's `synonyms.txt`; COCO's built-in
                ones when omitted.
            question: what is asked about each object, with `{object}` in its place.

        Raises:
            InputError: for unusable options or files.
        """
        if "{object}" not in question:
            raise InputError("reward yes_no: question has no {object}")
        self._chat = None if endpoint is None else ChatEndpoint(endpoint_config(endpoint, "yes_no"))
        self.fingerprint = "" if self._chat is None else self._chat.config.revision
        self._question = question
        self._vocabulary: Vocabulary | None = None
        if self._chat is not None:
            self._vocabulary = (
                coco_vocabulary()
                if vocabulary is None
                else read_vocabulary(as_path(vocabulary), strip=True)
            )

    def __call__(self, samples: Sequence[Response], prompts: Sequence[str]) -> Tensor:
        """Score answers; returns (B,) in [0, 1].

        Raises:
            InputError: for a row without a label, or a server without a usable answer.
        """
        if self._chat is None:
            return torch.tensor([_agrees(sample) for sample in samples])
        return torch.tensor(self._asked(self._chat, samples), dtype=torch.float64)

    def _asked(self, chat: ChatEndpoint, samples: Sequence[Response]) -> list[float]:
        assert self._vocabulary is not None
        questions: list[Question] = []
        owners: list[int] = []
        for index, sample in enumerate(samples):
            nodes = dict.fromkeys(m.node for m in self._vocabulary.mentions(sample.text))
            for node in nodes:
                article = "an" if node[0] in "aeiou" else "a"
                asked = self._question.replace("{object}", f"{article} {node}")
                questions.append(Question(asked, sample.images))
                owners.append(index)
        shares: list[list[float]] = [[] for _ in samples]
        for owner, (yes, no) in zip(owners, chat.yes_no(questions, 1), strict=True):
            shares[owner].append(yes / (yes + no) if yes + no > 0 else NOTHING_NAMED)
        return [sum(found) / len(found) if found else NOTHING_NAMED for found in shares]


def _agrees(sample: Response) -> float:
    label = str(sample.fields.get("label", "")).strip().lower()
    if label not in ("yes", "no"):
        raise InputError("the row has no label of yes or no; without one give the option endpoint")
    return float(read_yes_no(sample.text) == label)
