from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmalign.rewards.mps import FILE, OVERALL, MpsReward
from mmalign.types import InputError, Reward

from reward_zoo import (  # isort: skip
    PROMPTS,
    as_images,
    check_gradients,
    eight_bit,
    save_clip,
)

WIDTH, HEADS, INNER, DEPTH, HEAD = 24, 2, 40, 2, 64


def published_weights(folder: Path) -> dict[str, Tensor]:
    """The state dict of the authors' model: CLIP under `model.`, attention under `cross_model.`."""
    generator = torch.Generator().manual_seed(7)

    def linear(inputs: int, outputs: int) -> Tensor:
        return torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs)

    def norm() -> Tensor:
        return 1 + 0.3 * torch.randn(WIDTH, generator=generator)

    state = {f"model.{n}": v for n, v in load_file(folder / "model.safetensors").items()}
    state["model.text_model.embeddings.position_ids"] = torch.arange(24)[None]
    for layer in range(DEPTH):
        cross, within = (f"cross_model.layers.{layer}.{i}.fn" for i in (0, 1))
        state |= {
            f"{cross}.norm.weight": norm(),
            f"{cross}.norm.bias": torch.zeros(WIDTH),
            f"{cross}.to_q.weight": linear(WIDTH, HEADS * HEAD),
            f"{cross}.to_kv.weight": linear(WIDTH, 2 * HEAD),
            f"{cross}.to_out.weight": linear(HEADS * HEAD, WIDTH),
            f"{cross}.ff.0.weight": linear(WIDTH, 2 * INNER),
            f"{cross}.ff.2.weight": linear(INNER, WIDTH),
            f"{within}.norm.weight": norm(),
            f"{within}.norm.bias": torch.zeros(WIDTH),
            f"{within}.rotary_emb.inv_freq": 10_000.0 ** (-torch.arange(0, HEAD, 2) / HEAD),
            f"{within}.fused_attn_ff_proj.weight": linear(WIDTH, (HEADS + 2) * HEAD + 2 * INNER),
            f"{within}.attn_out.weight": linear(HEADS * HEAD, WIDTH),
            f"{within}.ff_out.1.weight": linear(INNER, WIDTH),
        }
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base model and checkpoint in one folder."""
    folder = save_clip(tmp_path_factory.mktemp("mps"))
    save_file(published_weights(folder), folder / FILE)
    return folder


def swiglu(x: Tensor, up: Tensor | None, down: Tensor) -> Tensor:
    values, gates = (x if up is None else x @ up.T).chunk(2, dim=-1)
    return (values * gates * gates.sigmoid()) @ down.T


def rotate(x: Tensor) -> Tensor:
    """Turn the pair (x_i, x_{i + d/2}) of token n by n / 10000^(2 i / d), as complex numbers."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    speeds = 10_000.0 ** (-2 * torch.arange(half, dtype=torch.float64) / x.shape[-1])
    angles = torch.arange(x.shape[0], dtype=torch.float64)[:, None] * speeds
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1).float()


def authors_network(state: dict[str, Tensor], image: Tensor, words: Tensor, seen: Tensor) -> Tensor:
    """One image's tokens (N, D) through the layers, head by head; the first token comes out."""
    x = image
    for layer in range(DEPTH):
        w = {
            name.split(f"cross_model.layers.{layer}.")[1]: value
            for name, value in state.items()
            if name.startswith(f"cross_model.layers.{layer}.")
        }
        y = F.layer_norm(x, (WIDTH,), w["0.fn.norm.weight"], w["0.fn.norm.bias"])
        keys, values = (words @ w["0.fn.to_kv.weight"].T).split(HEAD, dim=1)
        heads = []
        for q in (y @ w["0.fn.to_q.weight"].T).split(HEAD, dim=1):
            scores = q @ keys[seen].T / math.sqrt(HEAD)
            heads.append(scores.softmax(-1) @ values[seen])
        x = x + torch.cat(heads, dim=1) @ w["0.fn.to_out.weight"].T
        x = x + swiglu(y, w["0.fn.ff.0.weight"], w["0.fn.ff.2.weight"])
        y = F.layer_norm(x, (WIDTH,), w["1.fn.norm.weight"], w["1.fn.norm.bias"])
        fused = y @ w["1.fn.fused_attn_ff_proj.weight"].T
        *queries, keys, values, wide = fused.split([HEAD] * (HEADS + 2) + [2 * INNER], dim=1)
        heads = [
            (rotate(q) @ rotate(keys).T / math.sqrt(HEAD)).softmax(-1) @ values for q in queries
        ]
        x = x + torch.cat(heads, dim=1) @ w["1.fn.attn_out.weight"].T
        x = x + swiglu(wide, None, w["1.fn.ff_out.1.weight"])
    return x[0]


def authors_scores(folder: Path, images: Tensor, threshold: float) -> Tensor:
    model = CLIPModel.from_pretrained(folder).eval()
    state = published_weights(folder)
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(as_images(images), return_tensors="pt")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    with torch.no_grad():
        patches = model.visual_projection(model.vision_model(**pixels).last_hidden_state)
        for tokens, prompt in zip(patches, PROMPTS, strict=True):
            ids = tokenizer(
                [prompt, OVERALL],
                padding="max_length",
                truncation=True,
                max_length=24,
                return_tensors="pt",
            ).input_ids
            output = model.text_model(input_ids=ids)
            words, condition = model.text_projection(output.last_hidden_state)
            likeness = (words @ condition.T).max(dim=1).values
            seen = likeness / likeness.max() > threshold
            assert 0 < int(seen.sum()) < len(seen)
            looked = authors_network(state, tokens, words, seen)
            sentence = model.text_projection(output.pooler_output)[0]
            scores.append(model.logit_scale.exp() * F.cosine_similarity(looked, sentence, dim=0))
    return torch.stack(scores)


@pytest.mark.parametrize("threshold", [0.8, 0.9])
def test_equals_the_authors_network(folder: Path, threshold: float) -> None:
    reward = MpsReward(str(folder), str(folder), threshold=threshold)
    images = eight_bit(3, 3, 32, 32)
    scores = reward(images, PROMPTS)
    assert isinstance(reward, Reward)
    assert scores.std() > 0.5
    expected = authors_scores(folder, images, threshold)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)  # of up to 100


def test_condition_matters_and_the_batch_does_not(folder: Path) -> None:
    reward = MpsReward(str(folder), str(folder), threshold=0.9)
    images = eight_bit(3, 3, 40, 33)
    together = reward(images, PROMPTS)
    alone = [reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-3)
    reward.condition = "number"
    assert not torch.allclose(reward(images, PROMPTS), together, atol=0.01)


def test_gradients_reach_the_image(folder: Path) -> None:
    reward = MpsReward(str(folder), str(folder), dtype="float64")
    check_gradients(lambda images: reward(images, [PROMPTS[0]]), 1, 3, 19, 24)


def test_half_precision(folder: Path) -> None:
    images = eight_bit(3, 3, 32, 32)
    scores = MpsReward(str(folder), str(folder), dtype="bfloat16")(images, PROMPTS)
    assert scores.dtype == torch.float32
    assert bool(torch.isfinite(scores).all())


def test_published_pickle_is_refused(folder: Path, tmp_path: Path, exploit: Any) -> None:
    torch.save(exploit, tmp_path / "MPS_overall_checkpoint.pth")
    with pytest.raises(InputError, match="pickled objects, which are never loaded"):
        MpsReward(str(tmp_path / "MPS_overall_checkpoint.pth"), str(folder))
    assert not exploit.marker.exists()


def test_state_dict_of_torch(folder: Path, tmp_path: Path) -> None:
    torch.save(published_weights(folder), tmp_path / "mps.pth")
    images = eight_bit(3, 3, 32, 32)
    reward = MpsReward(str(tmp_path / "mps.pth"), str(folder))
    assert torch.equal(
        reward(images, PROMPTS), MpsReward(str(folder), str(folder))(images, PROMPTS)
    )


def test_missing_weights(folder: Path, tmp_path: Path) -> None:
    state = published_weights(folder)
    del state["cross_model.layers.1.1.fn.attn_out.weight"]
    save_file(state, tmp_path / FILE)
    with pytest.raises(InputError, match=r"lacks layers\.1\.1\.fn\.attn_out\.weight"):
        MpsReward(str(tmp_path), str(folder))
    save_file({n: v for n, v in state.items() if n.startswith("model.")}, tmp_path / FILE)
    with pytest.raises(InputError, match="no weights of MPS"):
        MpsReward(str(tmp_path), str(folder))


def test_threshold_that_hides_everything(folder: Path) -> None:
    with pytest.raises(InputError, match="hides every word"):
        MpsReward(str(folder), str(folder), threshold=1.0)
