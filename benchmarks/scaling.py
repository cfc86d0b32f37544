"""What a step of every method costs on the large models, counted: the tables of docs/scaling.md.

    python benchmarks/scaling.py

No weights are needed and nothing is computed: models are built without storage from their published
sizes. FLOPs are counted by torch on the meta device (a multiply and an add are two; attention in
full, also where it is causal). Activations are the tensors that a forward in bfloat16 saves for its
backward, under fused attention, weights left out. Nothing here is measured on a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel

from mmalign.config import ATTENTION_TARGETS, LANGUAGE_TARGETS

GIB, TERA = 2**30, 1e12
TRAINED_BYTES = 16
"""Per trained parameter: weight, gradient and two moments of AdamW, all float32."""
ANSWER = 100
"""Tokens of an answer."""


class Counted(NamedTuple):
    """A network at one size of input: FLOPs, parameters, and bytes saved for the backward."""

    forward: float
    backward: float
    parameters: int
    trained: int
    activations: float


class Vlm(NamedTuple):
    """A language model with its images: tokens of image and question, and its published sizes."""

    name: str
    prefix: int
    vision: bool
    config: dict[str, int]


VLMS = (
    Vlm("LLaVA-1.5 7B", 611, True, {"vocab_size": 32064}),
    Vlm(
        "LLaVA-1.5 13B",
        611,
        True,
        {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "vocab_size": 32064,
        },
    ),
    Vlm(
        "Qwen2.5-VL 72B",
        876,
        False,
        {
            "hidden_size": 8192,
            "intermediate_size": 29568,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 152064,
        },
    ),
)


class Method(NamedTuple):
    """Rows through the denoiser per unit, as benchmarks/costs.py counts them on every release."""

    name: str
    unit: str
    forwards: int
    backwards: int
    decoded: int = 0
    decoded_backwards: int = 0


METHODS = (
    Method("Diffusion-DPO, Curriculum DPO, KTO, DRO", "pair", 4, 2),
    Method("the same, reference errors cached; MaPO", "pair", 2, 2),
    Method("D3PO", "pair", 240, 80, 2),
    Method("TailorPO", "trajectory", 62, 10, 10),
    Method("DRaFT-1", "image", 102, 2, 1, 1),
    Method("DRaFT", "image", 200, 100, 1, 1),
)


def main() -> None:
    """Count and print both tables."""
    write = sys.stdout.write
    counted = [(model, language_model(model)) for model in VLMS]
    decoders = [decoder_at(side) for side in (512, 1024)]
    units = [unet_of(name) for name in ("SD 1.5", "SDXL")]
    write("| method | per | SD 1.5, 512 px | SDXL, 1024 px |\n|---|---|---|---|\n")
    for method in METHODS:
        cells = [flops(method, *parts) for parts in zip(units, decoders, strict=True)]
        write(f"| {method.name} | {method.unit} | {cells[0]:.3g} | {cells[1]:.3g} |\n")
    write("\n| | SD 1.5 | SDXL |\n|---|---|---|\n")
    for label, value in UNET_ROWS.items():
        write(f"| {label} | {value(units[0])} | {value(units[1])} |\n")
    shares = [f"{d.activations / GIB:.2f}" for d in decoders]
    write(f"| activations of decoding an image with gradients, GiB | {shares[0]} | {shares[1]} |\n")
    write("\n| | " + " | ".join(model.name for model in VLMS) + " |\n|---|---|---|---|\n")
    for label, value in VLM_ROWS.items():
        write(f"| {label} | " + " | ".join(value(*pair) for pair in counted) + " |\n")


def flops(method: Method, unet: Counted, decoder: Counted) -> float:
    """Add up a unit's TFLOP."""
    denoiser = method.forwards * unet.forward + method.backwards * unet.backward
    decoding = method.decoded * decoder.forward + method.decoded_backwards * decoder.backward
    return (denoiser + decoding) / TERA


def unet_of(name: str) -> Counted:
    """Count a UNet with LoRA of rank 8, one image."""
    options: dict[str, Any] = {"cross_attention_dim": 768, "sample_size": 64}
    tokens, more = (1, 77, 768), {}
    if name == "SDXL":
        options = {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "cross_attention_dim": 2048,
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        }
        tokens, more = (1, 77, 2048), {"text_embeds": (1, 1280), "time_ids": (1, 6)}
    side = options["sample_size"]

    def build() -> nn.Module:
        unet: Any = UNet2DConditionModel(**options).requires_grad_(False)
        unet.add_adapter(LoraConfig(r=8, target_modules=list(ATTENTION_TARGETS)))
        return unet

    def run(unet: Any) -> Tensor:
        kind = next(unet.parameters())
        added = {key: torch.zeros(shape).to(kind) for key, shape in more.items()}
        image, text = torch.zeros(1, 4, side, side).to(kind), torch.zeros(tokens).to(kind)
        return unet(image, torch.zeros(1), text, added_cond_kwargs=added or None).sample

    return count(build, run)


def decoder_at(side: int) -> Counted:
    """Count the decoder of the autoencoder, with a gradient to its latents."""

    def build() -> nn.Module:
        return AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        ).requires_grad_(False)

    def run(vae: Any) -> Tensor:
        kind = next(vae.parameters())
        latents = torch.zeros(1, 4, side // 8, side // 8).to(kind).requires_grad_()
        return vae.decode(latents).sample

    return count(build, run)


def language_model(model: Vlm) -> Counted:
    """Count a language model with LoRA of rank 128 at one pair: a prefix and two answers.

    All layers are alike, so one layer and two layers say what any number of them costs.
    """
    one, two = (decoder_layers(model, count) for count in (1, 2))
    more = model.config.get("num_hidden_layers", 32) - 1
    return Counted(*(a + more * (b - a) for a, b in zip(one, two, strict=True)))


def decoder_layers(model: Vlm, number: int) -> Counted:
    """Count a language model of so many layers."""
    config = LlamaConfig(**{**model.config, "num_hidden_layers": number})

    def build() -> nn.Module:
        layers: Any = LlamaModel(config).requires_grad_(False)
        targets = list(LANGUAGE_TARGETS)
        layers.add_adapter(LoraConfig(r=128, target_modules=targets))
        return layers

    def run(layers: Any) -> Tensor:
        width = layers.config.hidden_size
        kind = next(layers.parameters())
        length = model.prefix + 2 * ANSWER
        tokens = torch.zeros(1, length, width).to(kind)
        mask = torch.zeros(1, 1, length, length, dtype=torch.bool)
        output = layers(inputs_embeds=tokens, attention_mask=mask, use_cache=False)
        return output.last_hidden_state

    return count(build, run)


def vision_flops() -> float:
    """Count the forward of LLaVA-1.5's vision tower."""
    with torch.device("meta"):
        tower = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                image_size=336,
                patch_size=14,
            )
        )
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            tower(torch.zeros(1, 3, 336, 336))
    return float(counter.get_total_flops())


def count(build: Callable[[], nn.Module], run: Callable[[Any], Tensor]) -> Counted:
    """Count a forward and a backward, and then what a forward saves."""
    with torch.device("meta"):
        module = build()
        with FlopCounterMode(display=False) as forward:
            output = run(module)
        with FlopCounterMode(display=False) as backward:
            output.float().sum().backward()
    parameters = list(module.parameters())
    counted = Counted(
        forward=forward.get_total_flops(),
        backward=backward.get_total_flops(),
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        activations=saved_bytes(build, run),
    )
    sys.stderr.write(f"{type(module).__name__}: {counted}\n")
    return counted


def saved_bytes(build: Callable[[], nn.Module], run: Callable[[Any], Tensor]) -> float:
    """Add up what autograd saves, each storage once; fake tensors choose fused attention."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.device("meta"):
        module = build()
    fake: AbstractContextManager[object] = FakeTensorMode()
    with fake:
        _pretend(module)
        weights = {p.untyped_storage()._cdata for p in module.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = run(module)
        total = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)
        del output
    return float(total)


def _pretend(module: nn.Module) -> None:
    """Give a module weights in bfloat16 that are fake tensors of the CPU."""
    for part in module.modules():
        for name, value in part.named_parameters(recurse=False):
            weight = torch.empty(value.shape, dtype=torch.bfloat16)
            part._parameters[name] = nn.Parameter(weight, requires_grad=value.requires_grad)
        for name, value in part.named_buffers(recurse=False):
            part._buffers[name] = torch.empty(value.shape, dtype=value.dtype)


def _state(counted: Counted) -> str:
    frozen = counted.parameters - counted.trained
    return f"{(2 * frozen + TRAINED_BYTES * counted.trained) / GIB:.1f}"


def _full(counted: Counted) -> str:
    """Everything trained, and a frozen copy in float32."""
    return f"{(TRAINED_BYTES + 4) * (counted.parameters - counted.trained) / GIB:.1f}"


def _head(model: Vlm) -> int:
    return model.config["vocab_size"] * model.config.get("hidden_size", 4096)


def _divided(model: Vlm, counted: Counted, processes: int) -> str:
    """Weights of one process: its part of the layers, and all of embeddings and head."""
    rest = _head(model)  # LlamaModel holds the embeddings, not the head
    layers = counted.parameters - counted.trained - rest
    divided = 2 * layers + TRAINED_BYTES * counted.trained
    return f"{(divided / processes + 4 * rest) / GIB:.1f}"


def _pair(model: Vlm, counted: Counted, *, reference: bool, again: bool) -> str:
    forwards = 1 + reference + again
    heads = 2 * ANSWER * 2 * _head(model) * (2 + reference)
    vision = vision_flops() if model.vision else 0.0
    return f"{(forwards * counted.forward + counted.backward + heads + vision) / TERA:.3g}"


def _checkpointed(model: Vlm, counted: Counted) -> str:
    """Inputs of all layers, and what one layer saves."""
    width, layers = counted_width(model), model.config.get("num_hidden_layers", 32)
    inputs = 2 * (model.prefix + 2 * ANSWER) * width * layers
    return f"{(inputs + counted.activations / layers) / GIB:.2f}"


def counted_width(model: Vlm) -> int:
    """Return the width of the hidden states."""
    return model.config.get("hidden_size", 4096)


UNET_ROWS: dict[str, Callable[[Counted], str]] = {
    "a forward, TFLOP per image": lambda c: f"{c.forward / TERA:.3g}",
    "a backward with LoRA, TFLOP per image": lambda c: f"{c.backward / TERA:.3g}",
    "parameters, millions": lambda c: f"{(c.parameters - c.trained) / 1e6:.0f}",
    "weights and optimizer with LoRA of rank 8, GiB": _state,
    "the same with every weight trained, and its reference, GiB": _full,
    "activations per image, GiB": lambda c: f"{c.activations / GIB:.2f}",
}
VLM_ROWS: dict[str, Callable[[Vlm, Counted], str]] = {
    "tokens of a pair": lambda m, c: f"{m.prefix} + 2 x {ANSWER}",
    "a pair, reference cached, TFLOP": lambda m, c: _pair(m, c, reference=False, again=False),
    "a pair, TFLOP": lambda m, c: _pair(m, c, reference=True, again=False),
    "a pair, gradient_checkpointing, TFLOP": lambda m, c: _pair(m, c, reference=True, again=True),
    "parameters of the language model, billions": lambda m, c: (
        f"{(c.parameters - c.trained + _head(m)) / 1e9:.1f}"
    ),
    "weights and optimizer with LoRA of rank 128, ddp, GiB": lambda m, c: _divided(m, c, 1),
    "the same, fsdp2 over 8, GiB": lambda m, c: _divided(m, c, 8),
    "the same, fsdp2 over 64, GiB": lambda m, c: _divided(m, c, 64),
    "activations per pair, GiB": lambda m, c: f"{c.activations / GIB:.2f}",
    "the same, gradient_checkpointing, GiB": _checkpointed,
}


if __name__ == "__main__":
    main()
