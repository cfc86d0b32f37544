"""The words every part of mmalign shares: pairs, log-ratios, step outputs, protocols.

Shape legend, used in every docstring:

    B  pairs (or samples) in a batch         C, h, w  latent channels, height, width
    L  tokens of an encoded prompt           H, W     image height and width in pixels
    D  width of a prompt embedding           T        steps of a sampler

Batches of pairs are ordered `[chosen; rejected]` on dim 0, so a tensor of "2B" rows has the chosen
samples in its first half. Nothing here imports torch at run time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

    from mmalign.config import GenerationConfig, SamplingConfig
    from mmalign.diffusion import SamplerGrid, Transition

Modality = Literal["image", "text", "audio"]
Condition = dict[str, "Tensor"]
"""What a denoiser is conditioned on: named tensors with the batch on dim 0."""


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: what, where, and what to do."""


class ImageRef(NamedTuple):
    """An image that has not been decoded: a file, or the encoded bytes of one.

    `where` names it in messages: a path, or a file with a row number and column.
    """

    data: Path | bytes
    where: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferencePair:
    """Two answers to one prompt, of which `chosen` is preferred.

    For image generators `chosen` and `rejected` are images; for vision-language models they are
    texts. `margin` is `score_chosen - score_rejected` when both are known. `pair_id` is stable
    across runs and machines: all randomness of a sample is keyed by it.
    """

    pair_id: str
    prompt: str
    chosen: ImageRef | str
    rejected: ImageRef | str
    score_chosen: float | None = None
    score_rejected: float | None = None
    margin: float | None = None
    source: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class VlmPair:
    """Two answers to one question about images, of which `chosen` is preferred.

    `prompt` is the user's text without placeholders of images. `images` come before it, in order;
    those of a video are its frames, and there may be none. `revised` is a corrected version of the
    rejected answer, for methods that want one. The rest is as in `PreferencePair`. `where` names
    the row of the file in messages.
    """

    pair_id: str
    prompt: str
    chosen: str
    rejected: str
    images: tuple[ImageRef, ...]
    score_chosen: float | None = None
    score_rejected: float | None = None
    margin: float | None = None
    source: str | None = None
    revised: str | None = None
    where: str = ""


class Question(NamedTuple):
    """What a vision-language model is asked: a text without placeholders, about images."""

    prompt: str
    images: tuple[Image.Image | ImageRef, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """An answer to a question about images, as rewards of modality `text` take it.

    Attributes:
        text: the answer.
        images: what was asked about, in order; there may be none.
        fields: what else is known of it, such as `image_id`, `label` or `captions`.
    """

    text: str
    images: tuple[Image.Image | ImageRef, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)


class LogRatios(NamedTuple):
    """`log pi_policy - log pi_ref` of both sides of each pair; shape (B,) each."""

    chosen: Tensor
    rejected: Tensor


class LatentMoments(NamedTuple):
    """Mean and standard deviation of the latents of images, already scaled; (B, C, h, w) each."""

    mean: Tensor
    std: Tensor


class ImageAdapter(Protocol):
    """One family of image generators, seen by everything else.

    `denoiser` is the network being trained (the policy); a pipeline may replace it by a wrapped
    one. `alphas_cumprod` has shape (num_train_timesteps,). `fingerprint` identifies the weights
    and the preprocessing of the frozen parts (autoencoder and text encoders), for cache keys.
    """

    family: str
    denoiser: nn.Module
    prediction_type: Literal["epsilon", "v_prediction"]
    alphas_cumprod: Tensor
    fingerprint: str

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Return (C, h, w) of the latents of an image; the model's own size when omitted."""
        ...

    def encode_images(self, images: Tensor) -> LatentMoments:
        """Encode images (B, 3, H, W) in [0, 1]."""
        ...

    def encode_condition(self, prompts: Sequence[str], *, height: int, width: int) -> Condition:
        """Encode prompts, one row each; sizes in pixels."""
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise clean latents (B, C, h, w) to scheduler timesteps (B,)."""
        ...

    def predict(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        condition: Condition,
        *,
        guidance_scale: Tensor | None = None,
    ) -> Tensor:
        """Run `denoiser`; returns the raw model output (B, C, h, w).

        `guidance_scale` (B,) is the guidance embedding of consistency models, in the units of
        classifier-free guidance.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents to images (B, 3, H, W) in [0, 1]; differentiable."""
        ...

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: SamplingConfig
    ) -> Tensor:
        """Sample one image per prompt and seed, (B, 3, H, W) in [0, 1], without gradients."""
        ...

    def sampler_grid(self, num_inference_steps: int) -> SamplerGrid:
        """Lay out the steps of the family's stochastic sampler."""
        ...

    def guided_output(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        condition: Condition,
        negative: Condition,
        guidance_scale: float,
    ) -> Tensor:
        """Run `denoiser` with guidance; `negative` is the empty prompt's condition (1 row)."""
        ...

    def transition(
        self,
        model_output: Tensor,
        noisy_latents: Tensor,
        timesteps: Tensor,
        prev_alphas: Tensor,
        *,
        eta: float,
    ) -> Transition:
        """Take a sampler step from a guided model output."""
        ...


class ImageInputs(NamedTuple):
    """The images of one prefix as the model's processor prepares them.

    `tensors` are keyword arguments of the model such as `pixel_values`; `key` identifies images and
    preprocessing, for caches, and is None for images that are used once.
    """

    tensors: Mapping[str, Tensor]
    key: str | None = None


class ImageFeatures(NamedTuple):
    """What the language model sees of the images of one prefix.

    `embeds` (N, D) takes the place of the N image tokens; `deep` holds what some families add to
    the hidden states of the first layers, (N, D) each. `tensors` are those of `ImageInputs` that
    positions depend on.
    """

    embeds: Tensor
    deep: tuple[Tensor, ...] = ()
    tensors: Mapping[str, Tensor] = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedVlmPair:
    """A pair as tokens, without a batch dim.

    Attributes:
        pair_id: of the pair.
        prefix_ids: template, images and question, up to where the answer begins, (P,).
        prefix_text: True at the tokens of the user's own text, (P,): neither template nor image.
        chosen_ids: answer with its end token, (R,).
        rejected_ids: the same of the other side.
        revised_ids: the same of the revised answer, None without one.
        images: the images, None without any.
        truncated: whether an answer was shortened to fit.
    """

    pair_id: str
    prefix_ids: Tensor
    prefix_text: Tensor
    chosen_ids: Tensor
    rejected_ids: Tensor
    revised_ids: Tensor | None
    images: ImageInputs | None
    truncated: bool = False


class Branches(NamedTuple):
    """A prefix (P,) and the answers (R,) each that are scored after it, all tokens.

    With `labels`, one per answer, the tokens (R,) that are scored are those: each at its place of
    the answer, which is what stands before it. None scores the answer's own.
    """

    prefix_ids: Tensor
    answers: tuple[Tensor, ...]
    features: ImageFeatures | None
    labels: tuple[Tensor | None, ...] = ()


class Scored(NamedTuple):
    """An answer of R tokens after its prefix of P tokens.

    `logps` (R,) float32 are the log-probabilities of its tokens, or labels; `states` (P + R, D),
    where asked for, the last hidden states of both: those from P - 1 on predict the answer's
    tokens.
    """

    logps: Tensor
    states: Tensor | None = None


class VlmAdapter(Protocol):
    """One family of vision-language models, seen by everything else.

    `model` is the model of transformers with whatever LoRA it has. `policy` scores answers with it
    and is what a pipeline may replace by a wrapped one. `fingerprint` identifies weights,
    processor and chat template, for cache keys.
    """

    family: str
    model: nn.Module
    policy: nn.Module

    @property
    def fingerprint(self) -> str:
        """Hash of what the reference computes with."""
        ...

    def encode_pair(self, pair: VlmPair, *, max_length: int | None = None) -> EncodedVlmPair:
        """Turn a pair into tokens by the model's own chat template."""
        ...

    def encode_images(self, images: ImageInputs) -> ImageFeatures:
        """Run the vision tower and the projector."""
        ...

    def score(
        self,
        batch: Sequence[Branches],
        *,
        share_prefix: bool,
        share_images: bool = False,
        states: bool = False,
    ) -> list[list[Scored]]:
        """Score the answers of each prefix by `policy`, what they share computed once."""
        ...

    def token_logps(self, batch: Sequence[Branches], *, share_prefix: bool) -> list[list[Tensor]]:
        """Do the same, for the log-probabilities (R,) alone."""
        ...

    def generate(self, questions: Sequence[Question], config: GenerationConfig) -> list[str]:
        """Answer each question."""
        ...

    def yes_no(self, questions: Sequence[Question], batch_size: int) -> list[tuple[float, float]]:
        """Give the probabilities that an answer begins with yes and with no, any case."""
        ...


class Trajectory(NamedTuple):
    """What a sampler went through: T + 1 latents (B, C, h, w) from x_T to x_0.

    The step from `latents[i]` to `latents[i + 1]` is the grid's step i.
    """

    latents: list[Tensor]


class StepOutput(NamedTuple):
    """What one training step hands to the trainer: a scalar loss and metrics to log.

    `idle` says why there was nothing to learn from the batch. A step whose batches are all idle
    leaves the weights alone, where weight decay and momentum would move them without a reason.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor | float]
    idle: str | None = None


@runtime_checkable
class Reward(Protocol):
    """Scores samples; higher is better.

    `samples` of an image reward are float tensors (B, 3, H, W) in [0, 1] on any device. The result
    has shape (B,). Preprocessing stays in tensor space, so a `differentiable` reward passes
    gradients to its samples; `no_grad` is the caller's business.

    Two attributes are optional. `scores_sets`, true: a sample is scored against the others of its
    prompt in the call, so a call holds all samples of each of its prompts, is never cut within one,
    and its scores are kept in no cache. `fingerprint`: names what scores behind an option that does
    not say it, for caches; None keeps nothing.
    """

    name: str
    modality: Modality
    differentiable: bool
    range: tuple[float, float]

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each sample for its prompt."""
        ...


class TextReward(Protocol):
    """Scores answers, as `Reward` scores images; `modality` is `text`.

    `prompts` are the questions. Never differentiable: an answer is text.
    """

    name: str
    modality: Modality
    differentiable: bool
    range: tuple[float, float]

    def __call__(self, samples: Sequence[Response], prompts: Sequence[str]) -> Tensor:
        """Score each answer to its question; returns (B,)."""
        ...
