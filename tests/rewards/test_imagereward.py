from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF
from transformers import BertTokenizer

from mmalign.rewards.imagereward import CLIP_MEAN, CLIP_STD, ImageRewardReward
from mmalign.types import InputError, Reward

from reward_zoo import (  # isort: skip
    PHOTOS,
    as_tensor,
    check_gradients,
    eight_bit,
    levels,
    photo,
)

WIDTH, TEXT, HEADS, LAYERS = 128, 32, 4, 2
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "square"]
WORDS += ["two", "left", "of", "the", "##s"]
PROMPTS = ["a red circle", "two blue squares left of the circle", "a red circle"]


def published_weights() -> dict[str, Tensor]:
    """Random weights under the names in ImageReward.pt, extras included."""
    generator = torch.Generator().manual_seed(3)

    def linear(name: str, inputs: int, outputs: int) -> dict[str, Tensor]:
        weight = torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs)
        return {f"{name}.weight": weight, f"{name}.bias": _noise(outputs)}

    def norm(name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + _noise(width), f"{name}.bias": _noise(width)}

    def _noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    state: dict[str, Tensor] = {}
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    state[f"{vision}.cls_token"] = _noise(1, 1, WIDTH)
    state[f"{vision}.pos_embed"] = _noise(1, 5, WIDTH)
    state[f"{vision}.patch_embed.proj.weight"] = _noise(WIDTH, 3, 16, 16) * 0.3
    state[f"{vision}.patch_embed.proj.bias"] = _noise(WIDTH)
    state |= norm(f"{vision}.norm", WIDTH)
    for block in (f"{vision}.blocks.{i}" for i in range(LAYERS)):
        state |= norm(f"{block}.norm1", WIDTH) | norm(f"{block}.norm2", WIDTH)
        state |= linear(f"{block}.attn.qkv", WIDTH, 3 * WIDTH)
        state |= linear(f"{block}.attn.proj", WIDTH, WIDTH)
        state |= linear(f"{block}.mlp.fc1", WIDTH, 64) | linear(f"{block}.mlp.fc2", 64, WIDTH)
    state[f"{text}.embeddings.word_embeddings.weight"] = _noise(len(WORDS) + 2, TEXT)
    state[f"{text}.embeddings.position_embeddings.weight"] = _noise(40, TEXT)
    state[f"{text}.embeddings.position_ids"] = torch.arange(40)[None]
    state |= norm(f"{text}.embeddings.LayerNorm", TEXT)
    for layer in (f"{text}.encoder.layer.{i}" for i in range(LAYERS)):
        for kind, width in (("attention", TEXT), ("crossattention", WIDTH)):
            state |= linear(f"{layer}.{kind}.self.query", TEXT, TEXT)
            state |= linear(f"{layer}.{kind}.self.key", width, TEXT)
            state |= linear(f"{layer}.{kind}.self.value", width, TEXT)
            state |= linear(f"{layer}.{kind}.output.dense", TEXT, TEXT)
            state |= norm(f"{layer}.{kind}.output.LayerNorm", TEXT)
        state |= linear(f"{layer}.intermediate.dense", TEXT, 48)
        state |= linear(f"{layer}.output.dense", 48, TEXT)
        state |= norm(f"{layer}.output.LayerNorm", TEXT)
    state |= linear("blip.vision_proj", WIDTH, 8) | linear("blip.text_proj", TEXT, 8)
    for place, (inputs, outputs) in zip(
        (0, 2, 4, 6, 7), ((TEXT, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)), strict=True
    ):
        state |= linear(f"mlp.layers.{place}", inputs, outputs)
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagereward")
    torch.save(published_weights(), folder / "ImageReward.pt")
    config = {
        "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": TEXT,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 40,
        "model_type": "bert",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": len(WORDS) + 2,
        "encoder_width": 768,
        "add_cross_attention": True,
    }
    (folder / "med_config.json").write_text(json.dumps(config))
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("\n".join(WORDS))
    return folder


def load(folder: Path, **options: Any) -> ImageRewardReward:
    return ImageRewardReward(str(folder), tokenizer=str(folder / "bert"), **options)


class AuthorsNetwork:
    """ImageReward from the published description, on plain tensors: ViT, BERT, linear maps."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, hidden: Tensor | None) -> Tensor:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if hidden is not None:
            scores = scores - 10_000.0 * hidden[:, None, None, :]
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def see(self, pixels: Tensor) -> Tensor:
        name = "blip.visual_encoder"
        kernel = self.state[f"{name}.patch_embed.proj.weight"]
        patches = F.conv2d(pixels, kernel, self.state[f"{name}.patch_embed.proj.bias"], stride=16)
        x = patches.flatten(2).transpose(1, 2)
        x = torch.cat([self.state[f"{name}.cls_token"].expand(len(x), -1, -1), x], dim=1)
        x = x + self.state[f"{name}.pos_embed"]
        for block in (f"{name}.blocks.{i}" for i in range(LAYERS)):
            qkv = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6))
            mixed = self.attend(*qkv.chunk(3, dim=-1), WIDTH // 64, None)
            x = x + self.linear(f"{block}.attn.proj", mixed)
            inner = F.gelu(self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6)))
            x = x + self.linear(f"{block}.mlp.fc2", inner)
        return self.norm(f"{name}.norm", x, 1e-6)

    def read(self, ids: Tensor, mask: Tensor, patches: Tensor) -> Tensor:
        name = "blip.text_encoder"
        x = self.state[f"{name}.embeddings.word_embeddings.weight"][ids]
        x = x + self.state[f"{name}.embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self.norm(f"{name}.embeddings.LayerNorm", x, 1e-12)
        for layer in (f"{name}.encoder.layer.{i}" for i in range(LAYERS)):
            for kind, source in (("attention", None), ("crossattention", patches)):
                own = f"{layer}.{kind}.self"
                keys = x if source is None else source
                q, k, v = (
                    self.linear(f"{own}.{part}", x if part == "query" else keys)
                    for part in ("query", "key", "value")
                )
                mixed = self.attend(q, k, v, HEADS, None if source is not None else 1 - mask)
                out = self.linear(f"{layer}.{kind}.output.dense", mixed)
                x = self.norm(f"{layer}.{kind}.output.LayerNorm", out + x, 1e-12)
            inner = F.gelu(self.linear(f"{layer}.intermediate.dense", x))
            out = self.linear(f"{layer}.output.dense", inner)
            x = self.norm(f"{layer}.output.LayerNorm", out + x, 1e-12)
        return x[:, 0]

    def score(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.read(ids, mask, self.see(pixels))
        for place in (0, 2, 4, 6, 7):
            x = self.linear(f"mlp.layers.{place}", x)
        return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def tokens(folder: Path, prompts: list[str]) -> tuple[Tensor, Tensor]:
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    encoded = tokenizer(
        prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    return encoded["input_ids"], encoded["attention_mask"]


def test_equals_the_authors_network(folder: Path) -> None:
    reward = load(folder)
    images = eight_bit(3, 3, 32, 32)
    pixels = TF.normalize(images, CLIP_MEAN, CLIP_STD)
    expected = AuthorsNetwork(published_weights()).score(pixels, *tokens(folder, PROMPTS))
    scores = reward(images, PROMPTS)
    assert isinstance(reward, Reward)
    assert scores.std() > 0.05
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


def test_does_not_depend_on_the_batch(folder: Path) -> None:
    reward, images = load(folder), eight_bit(3, 3, 40, 33)
    together = reward(images, PROMPTS)
    alone = [reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_long_prompts_are_cut(folder: Path) -> None:
    prompt = "a red circle left of the blue square " * 9
    images = eight_bit(1, 3, 32, 32)
    ids, mask = tokens(folder, [prompt])
    assert ids.shape == (1, 35)
    assert int(mask.sum()) == 35
    expected = AuthorsNetwork(published_weights()).score(
        TF.normalize(images, CLIP_MEAN, CLIP_STD), ids, mask
    )
    torch.testing.assert_close(load(folder)(images, [prompt]), expected, rtol=0, atol=1e-5)


def test_gradients_reach_the_image(folder: Path) -> None:
    reward = load(folder, dtype="float64")
    check_gradients(lambda images: reward(images, [PROMPTS[0]]), 1, 3, 19, 24)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(folder: Path, dtype: str) -> None:
    images = eight_bit(3, 3, 32, 32)
    scores = load(folder, dtype=dtype)(images, PROMPTS)
    torch.testing.assert_close(scores, load(folder)(images, PROMPTS), rtol=0, atol=0.2)


@pytest.mark.parametrize("name", PHOTOS)
def test_preprocessing_equals_pillow_on_photographs(name: str, folder: Path) -> None:
    preprocess = load(folder).preprocess
    for image in (photo(name), photo(name).rotate(90, expand=True)):
        for size in (32, 224):
            ours = type(preprocess)(**{**vars(preprocess), "size": (size, size)})(as_tensor(image))
            theirs = TF.resize(image, size, InterpolationMode.BICUBIC)
            theirs = TF.to_tensor(TF.center_crop(theirs, [size, size]))
            theirs = TF.normalize(theirs, CLIP_MEAN, CLIP_STD)
            assert levels(ours, theirs[None], CLIP_STD) <= 1.001


def test_files_in_other_places(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes((folder / "ImageReward.pt").read_bytes())
    images = eight_bit(3, 3, 32, 32)
    reward = ImageRewardReward(
        str(tmp_path / "weights.pt"), str(folder / "med_config.json"), str(folder / "bert")
    )
    assert torch.equal(reward(images, PROMPTS), load(folder)(images, PROMPTS))
    with pytest.raises(InputError, match=r"has no med_config\.json"):
        ImageRewardReward(str(tmp_path / "weights.pt"), tokenizer=str(folder / "bert"))


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("blip.visual_encoder.blocks.1.norm1.weight", r"lacks encoder\.layers\.1\.layer_norm1"),
        ("blip.text_encoder.encoder.layer.0.crossattention.self.key.bias", "lacks encoder.layer.0"),
        ("blip.visual_encoder.cls_token", "no weights of BLIP's vision tower"),
        ("mlp.layers.4.bias", "has no bias"),
    ],
)
def test_missing_weights(folder: Path, tmp_path: Path, lost: str, message: str) -> None:
    state = published_weights()
    del state[lost]
    torch.save(state, tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_bytes((folder / "med_config.json").read_bytes())
    with pytest.raises(InputError, match=message):
        ImageRewardReward(str(tmp_path), tokenizer=str(folder / "bert"))


def test_damaged_config_and_tokenizer(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "med_config.json").write_text('{"hidden_size": 32}')
    with pytest.raises(InputError, match=r"is not BLIP's med_config\.json"):
        load(folder, med_config=str(tmp_path / "med_config.json"))
    with pytest.raises(InputError, match="has no files of a tokenizer"):
        ImageRewardReward(str(folder), tokenizer=str(tmp_path))
    vocabulary = [*WORDS, "more", "words"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    with pytest.raises(InputError, match=r"has 19 tokens, .* only 17"):
        ImageRewardReward(str(folder), tokenizer=str(tmp_path))


def test_pickled_checkpoint_is_refused(tmp_path: Path, exploit: Any) -> None:
    torch.save(exploit, tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text("{}")
    with pytest.raises(InputError, match="pickled objects, which are never loaded"):
        ImageRewardReward(str(tmp_path))
    assert not exploit.marker.exists()
