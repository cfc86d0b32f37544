"""Tiny random checkpoints in diffusers' real folder format, and what many tests share."""

from __future__ import annotations

import os

# Sums are the same on any number of cores, and processes do not fight for these. Torch reads it
# when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import string
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torchvision.models import squeezenet1_1
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

# Tests are not a package: what several of them share is imported by its own name.
sys.path.append(str(Path(__file__).parent / "support"))
pytest.register_assert_rewrite("benchmark_files", "reward_zoo", "shared_jobs")

import vlm_models

from mmalign import cli, endpoint

# Some tests fork, and a child of a process whose OpenMP threads have started hangs in its first
# parallel operation. One thread is also the fastest for models this small.
torch.set_num_threads(1)

WIDTH = 16
CONTEXT = 12
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@pytest.fixture(scope="session")
def alphas() -> torch.Tensor:
    """Alpha-bar of Stable Diffusion's schedule, (1000,) float64."""
    roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    return (1 - roots.square()).cumprod(0)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let requests to servers be tried again at once."""
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.0)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Leave no state of Accelerate, which is global, to the tests that follow."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must end with exit code 2 and one line on stderr; returns that line."""

    def run(*argv: str) -> str:
        assert cli.main(argv) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err.removeprefix("error: ").rstrip("\n")

    return run


@pytest.fixture(scope="session")
def lpips_options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Options of the reward `lpips` on a random SqueezeNet."""
    folder = tmp_path_factory.mktemp("lpips")
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        features = squeezenet1_1().features
    state = {
        f"features.{name}": 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in features.state_dict().items()
    }
    torch.save(state, folder / "backbone.pth")
    linear = {
        f"lin{level}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator)
        for level, width in enumerate((64, 128, 256, 384, 384, 512, 512))
    }
    torch.save(linear, folder / "squeeze.pth")
    return {
        "weights": str(folder / "squeeze.pth"),
        "backbone": str(folder / "backbone.pth"),
        "network": "squeeze",
    }


def make_tokenizer() -> CLIPTokenizer:
    letters = string.ascii_lowercase + string.digits + string.punctuation
    words = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>"]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(
        vocab=vocab, merges=[("r", "e"), ("re", "d</w>")], model_max_length=CONTEXT
    )


def make_text_encoder(tokenizer: CLIPTokenizer, *, projected: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.2,
    )


def make_unet(**options: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**settings, **options})


def save_sd(folder: Path, **schedule: Any) -> Path:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    StableDiffusionPipeline(
        vae=make_vae(),
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=make_unet(),
        scheduler=DDIMScheduler(**{**SCHEDULE, **schedule}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="session")
def tiny_sd_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd(tmp_path_factory.mktemp("models") / "sd_v", prediction_type="v_prediction")


@pytest.fixture(scope="session")
def tiny_lcm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "lcm"
    torch.manual_seed(1)
    tokenizer = make_tokenizer()
    LatentConsistencyModelPipeline(
        vae=make_vae(),
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=make_unet(time_cond_proj_dim=32),
        scheduler=LCMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sdxl"
    torch.manual_seed(2)
    tokenizer = make_tokenizer()
    time_width = 8
    StableDiffusionXLPipeline(
        vae=make_vae(),
        text_encoder=make_text_encoder(tokenizer),
        text_encoder_2=make_text_encoder(tokenizer, projected=True),
        tokenizer=tokenizer,
        tokenizer_2=make_tokenizer(),
        unet=make_unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=time_width,
            projection_class_embeddings_input_dim=WIDTH + 6 * time_width,
        ),
        scheduler=DDIMScheduler(**SCHEDULE),
        force_zeros_for_empty_prompt=True,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Build a tiny vision-language checkpoint by name, once per session."""
    builders: dict[str, Callable[[Path], Path]] = {
        "llava": vlm_models.save_llava,
        "llava_next": vlm_models.save_llava_next,
        "qwen2_vl": lambda folder: vlm_models.save_qwen(folder, "2"),
        "qwen2_5_vl": lambda folder: vlm_models.save_qwen(folder, "2.5"),
        "qwen3_vl": lambda folder: vlm_models.save_qwen(folder, "3"),
    }
    built: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in built:
            built[name] = builders[name](tmp_path_factory.mktemp("models") / name)
        return built[name]

    return build


@pytest.fixture(params=["tiny_sd", "tiny_sdxl", "tiny_lcm"])
def image_family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def image_model(image_family: str, request: pytest.FixtureRequest) -> Path:
    """The tiny checkpoint of each family in turn."""
    return Path(request.getfixturevalue(image_family))
