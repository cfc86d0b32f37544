"""What the families of vision-language models share: loading, tokens, scoring, answers."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from mmalign.adapters._answers import (
    GumbelSampling,
    draw_keys,
    image_batches,
    image_key,
    question_batches,
    yes_no_tokens,
)
from mmalign.adapters._branches import AnswerScorer, Whole
from mmalign.adapters._chat import Chat, Known, Prefix
from mmalign.adapters._diffusers import no_file_bars
from mmalign.adapters._folder import first_line
from mmalign.adapters._packing import Layout, Sharing
from mmalign.adapters._vlm_source import VlmSource, fingerprint_of
from mmalign.config import GenerationConfig
from mmalign.data.images import decode, hash_image
from mmalign.data.schema import RowError
from mmalign.sharding import checkpointing
from mmalign.types import (
    Branches,
    EncodedVlmPair,
    ImageFeatures,
    ImageInputs,
    ImageRef,
    InputError,
    Question,
    Scored,
    VlmPair,
)

MAX_PIXELS = 50_000_000


class TooLongError(RowError):
    """Images and question leave no room for an answer."""


class VlmFamily(ABC):
    """A `VlmAdapter` around a model and a processor of transformers.

    Attributes:
        family: model family.
        model: the model, with whatever LoRA it has.
        policy: scores answers; may be replaced by a wrapped one.
        chat: processor and chat template.
        context: longest sequence the language model was made for, in tokens.
        max_pixels: images with more pixels are refused.
    """

    family: str

    def __init__(self, source: VlmSource, device: torch.device, model: Any, processor: Any) -> None:
        """Wrap a loaded model; use `load`."""
        self.source, self.device = source, device
        self.model: Any = model
        self.chat = Chat(processor, source.name)
        self.policy: nn.Module = AnswerScorer(model, self.layout(), logits_chunk=256)
        self.context: int = model.config.get_text_config().max_position_embeddings
        self.max_pixels = MAX_PIXELS
        self._fingerprint: str | None = None
        self._yes_no: tuple[list[int], list[int]] | None = None
        # The checkpoint's own sampling settings would mix with those asked for.
        ends = model.generation_config.eos_token_id
        own = self.chat.tokenizer.eos_token_id
        ends = {own, *(ends if isinstance(ends, list) else [] if ends is None else [ends])}
        pad = self.chat.tokenizer.pad_token_id
        model.generation_config = transformers.GenerationConfig(
            eos_token_id=sorted(ends), pad_token_id=own if pad is None else pad
        )

    @classmethod
    def load(cls, source: VlmSource, device: torch.device) -> Self:
        """Load a checkpoint with everything frozen.

        Raises:
            InputError: the files are damaged or do not fit together.
        """
        try:
            with no_file_bars():
                processor = transformers.AutoProcessor.from_pretrained(
                    source.location, **source.options
                )
                model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
                    source.location,
                    dtype=source.dtype,
                    attn_implementation="sdpa",
                    use_safetensors=True,
                    **source.options,
                )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{source.name}: cannot be loaded: {first_line(error)}") from error
        if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_token"):
            raise InputError(f"{source.name}: has no processor of images and text")
        model.requires_grad_(False)
        _without_dropout(model)
        return cls(source, device, model.to(device).eval(), processor)

    @abstractmethod
    def layout(self) -> Layout:
        """Say what is different about this family."""

    @property
    def can_share_prefix(self) -> bool:
        """Whether attention sees everything before it, as the mask of shared prefixes says."""
        text = self.model.config.get_text_config()
        windowed = getattr(text, "use_sliding_window", True)
        return not (windowed and getattr(text, "sliding_window", None))

    @property
    def fingerprint(self) -> str:
        """Hash of the weights as they were when first asked for, processor and template."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint_of(self.model, self.chat.processor)
        return self._fingerprint

    def checkpoint_activations(self) -> None:
        """Compute activations again in the backward pass instead of keeping them."""
        model = self.model
        newer = getattr(model, "activation_checkpointing_enable", None)
        (newer or model.gradient_checkpointing_enable)(checkpointing())
        # The backward pass begins with the last layer, which would be computed again at once: it
        # holds no more memory when it keeps its activations, and may leave out what nobody reads.
        model.model.language_model.layers[-1].gradient_checkpointing = False

    def encode_pair(self, pair: VlmPair, *, max_length: int | None = None) -> EncodedVlmPair:
        """Turn a pair into tokens by the model's own chat template.

        Answers that do not fit are shortened at their end; images and question never are.

        Args:
            pair: question, images and answers.
            max_length: longest sequence in tokens; the model's context when omitted.

        Raises:
            TooLongError: there is no room for an answer, or shortened answers are the same.
            RowError: an image or a text cannot be used.
        """
        images = self.pictures(pair)
        prefix = self.chat.prefix(pair.prompt, images)
        room = min(max_length or self.context, self.context) - len(prefix.ids)
        if room < 1:
            raise TooLongError(
                f"images and question take {len(prefix.ids)} tokens, which leaves no room for an"
                f" answer within {room + len(prefix.ids)}"
            )
        chosen, rejected, revised = (
            None if text is None else self.chat.answer(pair.prompt, len(images), text)
            for text in (pair.chosen, pair.rejected, pair.revised)
        )
        assert chosen is not None
        assert rejected is not None
        truncated = max(len(chosen), len(rejected)) > room
        chosen, rejected = chosen[:room], rejected[:room]
        if truncated and torch.equal(chosen, rejected):
            raise TooLongError(f"the answers are the same in their first {room} tokens")
        key = None
        if images:
            key = hashlib.blake2b(
                b"".join(map(hash_image, pair.images)), digest_size=16
            ).hexdigest()
        return EncodedVlmPair(
            pair_id=pair.pair_id,
            prefix_ids=prefix.ids,
            prefix_text=prefix.text,
            chosen_ids=chosen,
            rejected_ids=rejected,
            revised_ids=None if revised is None else revised[:room],
            images=ImageInputs(prefix.images, key) if images else None,
            truncated=truncated,
        )

    def replaced_images(self, prompt: str, pictures: Sequence[Image.Image]) -> Prefix:
        """Tokenize a question with other pictures.

        Raises:
            RowError: a picture cannot be prepared.
        """
        return self.chat.prefix(prompt, pictures)

    def pictures(self, pair: VlmPair) -> list[Image.Image]:
        """Decode the images of a pair.

        Raises:
            RowError: naming an image that cannot be decoded.
        """
        return [_decoded(ref, self.max_pixels) for ref in pair.images]

    def encode_images(self, images: ImageInputs) -> ImageFeatures:
        """Run the vision tower and the projector on the images of one prefix."""
        tensors = {
            name: value.to(self.device, self.source.dtype)
            if value.is_floating_point()
            else value.to(self.device)
            for name, value in images.tensors.items()
        }
        output = self.model.model.get_image_features(**tensors, return_dict=True)
        embeds = torch.cat([part.reshape(-1, part.shape[-1]) for part in output.pooler_output])
        # A level is one tensor per image, or in transformers 5.17 one for all images.
        deep = [
            level if isinstance(level, Tensor) else torch.cat(list(level))
            for level in getattr(output, "deepstack_features", None) or ()
        ]
        small = {name: value for name, value in images.tensors.items() if name != "pixel_values"}
        return ImageFeatures(embeds, tuple(deep), small)

    def score(
        self,
        batch: Sequence[Branches],
        *,
        share_prefix: bool = True,
        share_images: bool = False,
        states: bool = False,
    ) -> list[list[Scored]]:
        """Score the answers of each prefix by `policy`.

        Args:
            batch: prefixes with their answers.
            share_prefix: compute each prefix once for all its answers.
            share_images: besides, compute images once for all prefixes that have the same object as
                features.
            states: return hidden states as well.
        """
        sharing = Sharing(share_prefix and self.can_share_prefix, share_images)
        scored: list[list[Scored]] = self.policy(Whole(batch), sharing, states)
        return scored

    def token_logps(
        self, batch: Sequence[Branches], *, share_prefix: bool = True
    ) -> list[list[Tensor]]:
        """Do the same, for the log-probabilities (R,) alone."""
        return [
            [s.logps for s in answers] for answers in self.score(batch, share_prefix=share_prefix)
        ]

    @torch.no_grad()
    def generate(self, questions: Sequence[Question], config: GenerationConfig) -> list[str]:
        """Answer each question.

        With `temperature` above 0 tokens are drawn by adding Gumbel noise to the logits, keyed by
        (seed, question, images, how often it was asked before in this list, token number): an
        answer depends neither on the batch it is part of nor on the other questions.

        Raises:
            InputError: an image or a question cannot be used.
        """
        answers = [""] * len(questions)
        keys = draw_keys(questions, config.seed)
        with self._answering():
            for places in question_batches(questions, config.batch_size):
                inputs = self._inputs([questions[i] for i in places])
                sampling: dict[str, Any] = {"num_beams": config.num_beams}
                if config.temperature > 0:
                    sampler = GumbelSampling(
                        [keys[i] for i in places], config.temperature, config.top_p
                    )
                    processors = transformers.LogitsProcessorList([sampler])
                    sampling = {"logits_processor": processors}
                output = self.model.generate(
                    **inputs, do_sample=False, max_new_tokens=config.max_new_tokens, **sampling
                )
                new = output[:, inputs["input_ids"].shape[1] :]
                texts = self.chat.tokenizer.batch_decode(new, skip_special_tokens=True)
                for place, text in zip(places, texts, strict=True):
                    answers[place] = text.strip()
        return answers

    @torch.no_grad()
    def yes_no(self, questions: Sequence[Question], batch_size: int) -> list[tuple[float, float]]:
        """Give the probabilities that an answer begins with yes and with no.

        They are sums over the tokens that say so in any case, with or without a space before.
        Images are encoded once, and read once by the language model for all questions of a batch.

        Raises:
            InputError: the tokenizer has no such token, or an image or a question cannot be used.
        """
        if self._yes_no is None:
            self._yes_no = yes_no_tokens(self.chat.tokenizer, self.source.name)
        results = [(0.0, 0.0)] * len(questions)
        scorer = AnswerScorer(self.model, self.layout(), logits_chunk=256)
        sharing = Sharing(self.can_share_prefix, images=True)
        with self._answering():
            seen: dict[Hashable, _Seen] = {}
            for places in image_batches(questions, batch_size):
                keys = {image_key(questions[i]) for i in places}
                seen = {key: value for key, value in seen.items() if key in keys}
                prefixes = [self._asked(questions[i], seen) for i in places]
                shares = scorer.last_logits(prefixes, sharing).softmax(1)
                sums = [shares[:, tokens].sum(1).tolist() for tokens in self._yes_no]
                for place, yes, no in zip(places, *sums, strict=True):
                    results[place] = (yes, no)
        return results

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Switch dropout and checkpointing off inside the block."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def _asked(self, question: Question, seen: dict[Hashable, _Seen]) -> Branches:
        """Tokenize a question; its images are decoded and encoded unless they were `seen`."""
        key, prompt = image_key(question), question.prompt
        try:
            if key in seen:
                known, features = seen[key]
                ids = self.chat.another(prompt, len(question.images), known)
                return Branches(ids, (), features)
            images = self._pictures(question)
            prefix = self.chat.prefix(prompt, images)
        except RowError as error:
            raise InputError(f"question {prompt[:60]!r}: {error}") from error
        features = self.encode_images(ImageInputs(prefix.images)) if images else None
        seen[key] = _Seen(Known(prompt, prefix.ids), features)
        return Branches(prefix.ids, (), features)

    def _inputs(self, questions: Sequence[Question]) -> Mapping[str, Any]:
        """Prepare questions that all have images, or all have none, for `generate`."""
        images = [self._pictures(question) for question in questions]
        texts = []
        for question, pictures in zip(questions, images, strict=True):
            try:
                text = self.chat.text(question.prompt, len(pictures))
                self.chat.check_controls(text, len(pictures))
            except RowError as error:
                raise InputError(f"question {question.prompt[:60]!r}: {error}") from error
            texts.append(text)
        inputs = self.chat.processor(
            text=texts,
            images=images if images[0] else None,
            add_special_tokens=self.chat.adds_special(texts[0]),
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        placed: Mapping[str, Any] = inputs.to(self.device, dtype=self.source.dtype)
        return placed

    def _pictures(self, question: Question) -> list[Image.Image]:
        pictures = []
        for image in question.images:
            try:
                picture = _decoded(image, self.max_pixels) if isinstance(image, ImageRef) else image
            except RowError as error:
                raise InputError(str(error)) from error
            pictures.append(picture.convert("RGB"))
        return pictures


class _Seen(NamedTuple):
    """Images that a question was asked about."""

    known: Known
    features: ImageFeatures | None


def _without_dropout(model: nn.Module) -> None:
    """Make training and scoring the same function: cached log-probs of the reference rely on it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _decoded(ref: ImageRef, max_pixels: int) -> Image.Image:
    try:
        return decode(ref, max_pixels)
    except RowError as error:
        raise RowError(f"{ref.where}: {error}") from error
