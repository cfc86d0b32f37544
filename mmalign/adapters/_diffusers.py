"""What the families of diffusers' Stable Diffusion pipelines share.

Sampling is left to the upstream pipeline with one CPU generator per image, so that images equal
those of plain diffusers and do not depend on the batch size. The safety checker is not loaded: it
would put black images among the candidates of a preference pair. Exported checkpoints keep it.
"""

from __future__ import annotations

import copy
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self, cast

import diffusers
import torch
import transformers
import xxhash
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors import SafetensorError
from torch import Tensor, nn

from mmalign.adapters._ddim import DdimSteps
from mmalign.adapters._folder import first_line
from mmalign.adapters._source import ModelSource
from mmalign.config import SamplingConfig
from mmalign.diffusion import PredictionType, add_noise
from mmalign.lora import lora_scaling
from mmalign.sharding import unwrapped
from mmalign.types import Condition, InputError, LatentMoments


class DiffusersAdapter(DdimSteps, ABC):
    """An `ImageAdapter` around a diffusers pipeline with a UNet, an autoencoder and text encoders.

    Attributes:
        family: model family.
        denoiser: the network being trained; may be replaced by a wrapped one.
        prediction_type: what the denoiser predicts.
        alphas_cumprod: alpha-bar of the checkpoint's schedule, (num_train_timesteps,) float32.
        fingerprint: hash of weights and settings of autoencoder, text encoders and tokenizers.
    """

    family: str
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    without_safety_checker: ClassVar[dict[str, Any]] = {}
    encoders: ClassVar[tuple[str, ...]] = ("vae", "text_encoder")

    def __init__(self, source: ModelSource, device: torch.device, pipeline: Any) -> None:
        """Wrap a loaded pipeline; use `load`."""
        self.source = source
        self.device = device
        self.denoiser: nn.Module = pipeline.unet
        self.prediction_type: PredictionType = _prediction_type(source, pipeline.scheduler)
        self.alphas_cumprod: Tensor = pipeline.scheduler.alphas_cumprod.float().to(device)
        self._pipeline = pipeline
        self._released: tuple[str, ...] = ()
        self._precise_vae: AutoencoderKL | None = None
        self._fingerprint: str | None = None

    @classmethod
    def load(cls, source: ModelSource, device: torch.device) -> Self:
        """Load a checkpoint with everything frozen.

        Raises:
            InputError: the files are damaged or do not fit together.
        """
        pipeline: Any = from_pretrained(cls.pipeline_class, source, **cls.without_safety_checker)
        for name in ("unet", *cls.encoders):
            getattr(pipeline, name).requires_grad_(False)
        pipeline.set_progress_bar_config(disable=True)
        cls._check(source, pipeline)
        return cls(source, device, pipeline.to(device))

    @classmethod
    def _check(cls, source: ModelSource, pipeline: Any) -> None:
        """Refuse a checkpoint that the family cannot handle."""
        if not hasattr(pipeline.scheduler, "alphas_cumprod"):
            name = type(pipeline.scheduler).__name__
            raise InputError(
                f"{source.name}: scheduler {name} has no alphas_cumprod, the noise schedule of"
                " diffusion; DDIM, DDPM, PNDM, DPM-Solver, UniPC, Euler and LCM schedulers have"
            )

    @property
    def pipeline(self) -> DiffusionPipeline:
        """The upstream pipeline around the current denoiser; loads released encoders again."""
        unet = unwrapped(self.denoiser)
        if self._released:
            fresh = from_pretrained(
                self.pipeline_class,
                self.source,
                unet=unet,
                scheduler=self._pipeline.scheduler,
                **self.without_safety_checker,
            )
            for name in self._released:
                encoder = getattr(fresh, name).requires_grad_(False)
                setattr(self._pipeline, name, encoder.to(self.device))
            self._released = ()
        self._pipeline.unet = unet
        return cast(DiffusionPipeline, self._pipeline)

    @property
    def _scheduler_config(self) -> Any:
        return self._pipeline.scheduler.config

    @property
    def fingerprint(self) -> str:
        """Hash of weights and settings of autoencoder, text encoders and tokenizers."""
        if self._fingerprint is None:
            self._fingerprint = self._hash_frozen_parts()
        return self._fingerprint

    @fingerprint.setter
    def fingerprint(self, value: str) -> None:
        self._fingerprint = value

    def release_encoders(self) -> None:
        """Drop autoencoder and text encoders from memory; the next use loads them again.

        Text encoders that carry a LoRA stay.
        """
        self._released = tuple(
            name
            for name in self.encoders
            if not getattr(getattr(self._pipeline, name), "peft_config", None)
        )
        for name in self._released:
            setattr(self._pipeline, name, None)
        self._precise_vae = None

    def complete_pipeline(self, unet: nn.Module) -> DiffusionPipeline:
        """Load the checkpoint again with another denoiser and every part, on CPU."""
        return from_pretrained(self.pipeline_class, self.source, unet=unet)

    @property
    def pixels_per_latent(self) -> int:
        """How many pixels of height or width one latent stands for."""
        return int(cast(Any, self._pipeline).vae_scale_factor)

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Return (C, h, w) of the latents of an image; the model's own size when omitted."""
        config = cast(Any, unwrapped(self.denoiser)).config
        factor = self.pixels_per_latent
        rows, columns = (side // factor if side else config.sample_size for side in (height, width))
        return config.in_channels, rows, columns

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> LatentMoments:
        """Encode images (B, 3, H, W) in [0, 1].

        Returns:
            Mean and standard deviation of the posterior times the scaling factor, float32, also for
            half-precision checkpoints.
        """
        vae = self._vae()
        pixels = images.to(self.device, vae.dtype) * 2 - 1
        posterior = cast(Any, vae.encode(pixels)).latent_dist
        scale = vae.config.scaling_factor
        return LatentMoments(posterior.mean.float() * scale, posterior.std.float() * scale)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (B, C, h, w) to images (B, 3, H, W) in [0, 1]; differentiable."""
        vae = self._vae()
        scaled = latents.to(self.device, vae.dtype) / vae.config.scaling_factor
        images: Tensor = vae.decode(scaled, return_dict=False)[0]
        return (images.float() * 0.5 + 0.5).clamp(0, 1)

    @abstractmethod
    def encode_condition(self, prompts: Sequence[str], *, height: int, width: int) -> Condition:
        """Encode prompts, one row each, without gradients; sizes in pixels."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise clean latents (B, C, h, w) to scheduler timesteps (B,)."""
        return add_noise(latents, noise, timesteps, self.alphas_cumprod)

    def predict(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        condition: Condition,
        *,
        guidance_scale: Tensor | None = None,
    ) -> Tensor:
        """Run `denoiser` in the dtype of its weights; returns the raw output (B, C, h, w).

        Args:
            noisy_latents: (B, C, h, w).
            timesteps: scheduler timesteps (B,).
            condition: what `encode_condition` returned.
            guidance_scale: (B,), for consistency models only, in the units of `SamplingConfig`.
        """
        dtype = next(self.denoiser.parameters()).dtype
        device = noisy_latents.device
        inputs = {name: value.to(device, dtype) for name, value in condition.items()}
        output: Tensor = self.denoiser(
            noisy_latents.to(dtype),
            timesteps,
            encoder_hidden_states=inputs["prompt_embeds"],
            return_dict=False,
            **self._extra_inputs(inputs, guidance_scale),
        )[0]
        return output

    def _extra_inputs(self, inputs: Condition, guidance_scale: Tensor | None) -> dict[str, Any]:
        if guidance_scale is not None:
            raise ValueError(f"family {self.family} has no guidance embedding")
        return {}

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: SamplingConfig
    ) -> Tensor:
        """Sample one image per prompt and seed, (B, 3, H, W) float32 in [0, 1], without gradients.

        The checkpoint's own scheduler is used. Image i starts from a CPU generator seeded by
        `seeds[i]`, as in `pipeline(prompts, generator=[...])`.

        Raises:
            InputError: the sampling options do not suit the model.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
        pipeline: Any = self.pipeline
        options = self._sampling_options(sampling)
        parts = []
        with self._for_sampling(pipeline), torch.no_grad():
            for start in range(0, len(prompts), sampling.batch_size):
                rows = slice(start, start + sampling.batch_size)
                generators = [torch.Generator().manual_seed(seed) for seed in seeds[rows]]
                try:
                    result = pipeline(list(prompts[rows]), generator=generators, **options)
                except ValueError as error:
                    raise InputError(f"sampling: {first_line(error)}") from error
                parts.append(result.images.float())
        return torch.cat(parts)

    def _sampling_options(self, sampling: SamplingConfig) -> dict[str, Any]:
        if sampling.batch_size < 1:
            raise InputError(f"sampling.batch_size: must be at least 1, got {sampling.batch_size}")
        if sampling.num_inference_steps < 1:
            steps = sampling.num_inference_steps
            raise InputError(f"sampling.num_inference_steps: must be at least 1, got {steps}")
        scheduler = self._pipeline.scheduler
        takes_eta = "eta" in inspect.signature(scheduler.step).parameters
        if sampling.eta != 0 and not takes_eta:
            raise InputError(f"sampling.eta: {type(scheduler).__name__} takes no eta; set it to 0")
        options: dict[str, Any] = {
            "num_inference_steps": sampling.num_inference_steps,
            "guidance_scale": sampling.guidance_scale,
            "height": sampling.height,
            "width": sampling.width,
            "output_type": "pt",
        }
        return {**options, "eta": sampling.eta} if takes_eta else options

    @contextmanager
    def _for_sampling(self, pipeline: Any) -> Iterator[None]:
        """Switch to evaluation mode, and to the dtype of the other parts by way of a copy."""
        unet, training = pipeline.unet, pipeline.unet.training
        unet.eval()
        if self.source.denoiser_dtype != self.source.dtype:
            pipeline.unet = copy.deepcopy(unet).to(self.source.dtype)
        try:
            yield
        finally:
            pipeline.unet = unet.train(training)

    def _vae(self) -> AutoencoderKL:
        """Return the autoencoder, in float32 where half precision would overflow."""
        vae: AutoencoderKL = cast(Any, self.pipeline).vae
        if vae.dtype == torch.float32 or not vae.config.force_upcast:
            return vae
        if self._precise_vae is None:
            self._precise_vae = copy.deepcopy(vae).float()
        return self._precise_vae

    def _hash_frozen_parts(self) -> str:
        pipeline: Any = self.pipeline
        digest = xxhash.xxh3_128(f"{self.family} {self.source.dtype}".encode())
        digest.update(_settings(pipeline.config).encode())
        for name in self.encoders:
            part = getattr(pipeline, name)
            config = part.config if isinstance(part.config, dict) else part.config.to_dict()
            digest.update(_settings(config).encode())
            for key, tensor in sorted(part.state_dict().items()):
                digest.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                digest.update(raw.numpy().data)
            digest.update(lora_scaling(part).encode())
            if name != "vae":
                tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
                vocabulary = sorted(tokenizer.get_vocab().items())
                digest.update(json.dumps([vocabulary, tokenizer.model_max_length]).encode())
        return digest.hexdigest()


def from_pretrained(
    pipeline_class: type[DiffusionPipeline], source: ModelSource, **parts: Any
) -> DiffusionPipeline:
    """Load a pipeline from safetensors; `parts` replace components.

    Raises:
        InputError: the files are missing, damaged or do not fit together.
    """
    loader: Any = pipeline_class
    try:
        with no_file_bars():
            return cast(
                DiffusionPipeline,
                loader.from_pretrained(
                    source.location,
                    dtype={"unet": source.denoiser_dtype, "default": source.dtype},
                    **source.options,
                    **parts,
                ),
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{source.name}: cannot be loaded: {first_line(error)}") from error


def _settings(config: dict[str, Any]) -> str:
    """Serialize a configuration without its components and what wrote it where."""
    kept = {
        key: value
        for key, value in config.items()
        if not key.startswith("_")
        and key != "transformers_version"
        and not isinstance(value, tuple)
    }
    return json.dumps(kept, default=str, sort_keys=True)


def _prediction_type(source: ModelSource, scheduler: Any) -> PredictionType:
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise InputError(
            f"{source.name}: prediction_type {kind!r} is not supported;"
            " epsilon and v_prediction are"
        )
    return cast(PredictionType, kind)


@contextmanager
def no_file_bars() -> Iterator[None]:
    """Hide the bars over a handful of files that come with every load and save."""
    switches = [diffusers.utils.logging, transformers.utils.logging]
    enabled = [switch for switch in switches if switch.is_progress_bar_enabled()]
    for switch in enabled:
        switch.disable_progress_bar()
    try:
        yield
    finally:
        for switch in enabled:
            switch.enable_progress_bar()
