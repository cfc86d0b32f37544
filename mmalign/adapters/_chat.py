"""From a question and its answers to tokens, by the model's own chat template.

Where an answer begins is read off the template: the text rendered with an answer starts with the
text rendered up to where the model would begin to answer. What follows are the answer's tokens,
its end token included. So template, images and question are known exactly, token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import jinja2
import torch
from PIL import Image
from torch import Tensor

from mmalign.data.schema import RowError
from mmalign.types import InputError

PROBE, ANSWER = "What is it", "A thing"


class Prefix(NamedTuple):
    """Template, images and question as the model reads them.

    `ids` (P,) and `text` (P,), True at the user's own words. `images` are the model's keyword
    arguments, empty without images.
    """

    ids: Tensor
    text: Tensor
    images: dict[str, Tensor]


class Known(NamedTuple):
    """A question that was tokenized with its images, (P,)."""

    prompt: str
    ids: Tensor


class Chat:
    """A processor with its chat template."""

    def __init__(self, processor: Any, name: str) -> None:
        """Wrap a processor and try its template.

        Raises:
            InputError: there is no template, or it is not one that can be used.
        """
        self.processor, self.name = processor, name
        self.tokenizer: Any = processor.tokenizer
        self.image_token: str = processor.image_token
        if not (processor.chat_template or self.tokenizer.chat_template):
            raise InputError(
                f"{name}: its processor has no chat template; put the model's own into"
                " chat_template.jinja in its folder"
            )
        if self.tokenizer.eos_token_id is None:
            raise InputError(f"{name}: its tokenizer has no eos_token, which ends an answer")
        if not self.tokenizer.is_fast:
            raise InputError(f"{name}: its tokenizer gives no offsets; save it as tokenizer.json")
        self._controls = lru_cache(maxsize=None)(self._count_special)
        self._try()

    def text(self, prompt: str, images: int) -> str:
        """Render a question up to where the answer begins.

        Raises:
            RowError: the template refuses it.
        """
        return self._render(_user(prompt, images), answer=None)

    def prefix(self, prompt: str, images: Sequence[Image.Image]) -> Prefix:
        """Tokenize a question with its images.

        Raises:
            RowError: the question has control tokens of the model, the template changes it, or an
                image cannot be prepared.
        """
        text = self.text(prompt, len(images))
        self.check_controls(text, len(images))
        try:
            encoded = self.processor(
                text=[text],
                images=list(images) or None,
                add_special_tokens=self.adds_special(text),
                return_tensors="pt",
            )
        except ValueError as error:  # such as an aspect ratio that no grid of patches has
            reason = str(error).splitlines()[0]
            raise RowError(f"the images cannot be prepared: {reason}") from error
        ids = encoded["input_ids"][0]
        ignored = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
        tensors = {name: value for name, value in encoded.items() if name not in ignored}
        return Prefix(ids, self._text_mask(text, prompt, ids), tensors)

    def another(self, prompt: str, images: int, known: Known) -> Tensor:
        """Tokenize another question (P,) about images whose tokens are known.

        The images are not prepared again: up to the last of them a prefix is the same whatever is
        asked.

        Raises:
            RowError: as `prefix`, or the template puts the question before the images.
        """
        text, earlier = self.text(prompt, images), self.text(known.prompt, images)
        self.check_controls(text, images)
        begin = text.rfind(self.image_token) + len(self.image_token) if images else 0
        if text[:begin] != earlier[:begin]:
            raise RowError("the chat template does not put images before the question")
        token = self.tokenizer.convert_tokens_to_ids(self.image_token)
        plain = torch.tensor(self.ids(text))
        parts = [known.ids[: _after_last(known.ids, token)], plain[_after_last(plain, token) :]]
        return torch.cat(parts)

    def answer(self, prompt: str, images: int, answer: str) -> Tensor:
        """Tokenize an answer to a question about so many images, (R,), with its end token.

        Raises:
            RowError: the answer has control tokens of the model, or the template refuses it.
        """
        begin = self.text(prompt, images)
        text = self._with_answer(prompt, images, answer, begin)
        before, after = self.ids(begin), self.ids(text)
        if after[: len(before)] == before:
            ids = after[len(before) :]
        else:  # a tokenizer that merges across the border
            ids = self._tokenize(text[len(begin) :], special=False)
        if any(token in self.special_ids for token in ids[:-1]):
            raise RowError("an answer has control tokens of the model, such as <image>")
        return torch.tensor(ids)

    def ids(self, text: str) -> list[int]:
        """Tokenize rendered text, its images not expanded."""
        return self._tokenize(text, special=self.adds_special(text))

    def check_controls(self, text: str, images: int) -> None:
        """Check that a rendered question has no more control tokens than its template.

        Raises:
            RowError: it has.
        """
        if sum(token in self.special_ids for token in self.ids(text)) != self._controls(images):
            raise RowError("the question has control tokens of the model, such as <image>")

    def adds_special(self, text: str) -> bool:
        """Tell whether the tokenizer adds its begin token: not to templates that have it."""
        begin = self.tokenizer.bos_token
        return begin is None or not text.startswith(begin)

    @cached_property
    def special_ids(self) -> set[int]:
        """Tokens that no user's text may have."""
        tokenizer = self.tokenizer
        named = [self.image_token, getattr(self.processor, "video_token", None)]
        ids = {tokenizer.convert_tokens_to_ids(token) for token in named if token is not None}
        return {*tokenizer.all_special_ids, *ids} - {tokenizer.unk_token_id}

    def _tokenize(self, text: str, *, special: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def _with_answer(self, prompt: str, images: int, answer: str, begin: str) -> str:
        text = self._render(_user(prompt, images), answer=answer)
        if not text.startswith(begin):
            raise RowError("the chat template renders the question otherwise once it has an answer")
        text = text.rstrip()
        ends = [self.tokenizer.convert_ids_to_tokens(i) for i in self.end_ids]
        if not any(text.endswith(end) for end in ends):
            text += self.tokenizer.eos_token  # templates such as LLaVA's leave it to the caller
        return text

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end an answer."""
        return [self.tokenizer.eos_token_id]

    def _render(self, message: dict[str, Any], answer: str | None) -> str:
        messages = [message]
        if answer is not None:
            content = [{"type": "text", "text": answer}]
            messages.append({"role": "assistant", "content": content})
        try:
            text: str = self.processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer is None
            )
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if isinstance(error, TypeError):  # templates of models that see no images
                reason += "; it must take content as a list of parts of type image and text"
            raise RowError(f"the chat template cannot be applied: {reason}") from error
        return text

    def _try(self) -> None:
        """Render one question with an answer, to find out whether the template is of use."""
        try:
            begin = self.text(PROBE, 1)
            tail = self._with_answer(PROBE, 1, ANSWER, begin)[len(begin) :]
        except RowError as error:
            raise InputError(f"{self.name}: {error}") from error
        count = begin.count(self.image_token)
        problem = None
        if count != 1:
            problem = f"renders one image as {count} {self.image_token}"
        elif PROBE not in begin or ANSWER not in tail:
            problem = "leaves out the question or the answer"
        if problem is not None:
            raise InputError(
                f"{self.name}: its chat template {problem}; it is not the one of this model"
            )

    def _count_special(self, images: int) -> int:
        return sum(token in self.special_ids for token in self.ids(self.text(PROBE, images)))

    def _text_mask(self, text: str, prompt: str, ids: Tensor) -> Tensor:
        """Mark the tokens of the prompt within the expanded ids, (P,).

        Images come first, so the tokens after the last one are the same in both.
        """
        words = prompt.strip()
        start = text.rfind(words)
        if start < 0:
            raise RowError("the chat template changes the words of the question")
        encoded = self.tokenizer(
            text, add_special_tokens=self.adds_special(text), return_offsets_mapping=True
        )
        plain, offsets = encoded["input_ids"], encoded["offset_mapping"]
        inside = [_within(text, begin, end, start, start + len(words)) for begin, end in offsets]
        image = self.tokenizer.convert_tokens_to_ids(self.image_token)
        last = max((i for i, token in enumerate(plain) if token == image), default=-1)
        tail = len(plain) - last - 1
        if any(inside[: last + 1]) or plain[len(plain) - tail :] != ids[len(ids) - tail :].tolist():
            raise RowError("the chat template does not put images before the question")
        mask = torch.zeros(len(ids), dtype=torch.bool)
        mask[len(ids) - tail :] = torch.tensor(inside[len(plain) - tail :], dtype=torch.bool)
        return mask


def _user(prompt: str, images: int) -> dict[str, Any]:
    content: list[dict[str, str]] = [{"type": "image"}] * images
    return {"role": "user", "content": [*content, {"type": "text", "text": prompt}]}


def _after_last(ids: Tensor, token: int) -> int:
    """Return the place behind the last such token, 0 if there is none."""
    found = (ids == token).nonzero()
    return int(found[-1]) + 1 if len(found) else 0


def _within(text: str, begin: int, end: int, start: int, stop: int) -> bool:
    """Whether a token covers some of the words, and besides them white space only."""
    outside = text[begin : max(begin, start)] + text[min(end, stop) : end]
    return begin < stop and end > start and end > begin and not outside.strip()
