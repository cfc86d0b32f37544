"""The build of Shapes world's models, each stage for a few steps."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, StableDiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTokenizer

from mmalign.config import as_path
from mmalign.pipelines.build_shapes import save_pipeline, write_hashes, write_prompts
from mmalign.shapes.build import decoded, text_to_image
from mmalign.shapes.build.autoencoder import build_autoencoder, refine_decoder
from mmalign.shapes.build.consistency import build_student
from mmalign.shapes.build.loop import train
from mmalign.shapes.build.measure import prompt_following
from mmalign.shapes.build.near_miss import spoil, spoil_scene
from mmalign.shapes.build.reward import build_reward, model_config, save_reward, text_tower
from mmalign.shapes.build.scenes import pixels
from mmalign.shapes.build.text import (
    QUESTIONS,
    Reader,
    build_text_encoder,
    new_text_encoder,
    phrases,
    tokenize,
)
from mmalign.shapes.build.text_to_image import Stage, build_generator, draw_timesteps
from mmalign.shapes.build.tokenizer import CONTEXT, build_tokenizer
from mmalign.shapes.captions import ObjectPhrase, describe
from mmalign.shapes.scene import COLORS, SHAPES, SIZES, sample_scene


def test_every_caption_word_is_one_token() -> None:
    tokenizer = build_tokenizer(0, captions=3000)
    rng = random.Random(0)
    for _ in range(100):
        text = describe(sample_scene(rng), rng).text
        words = text.replace(",", " ,").split()
        assert tokenizer.tokenize(text) == [f"{word}</w>" for word in words]
        assert len(tokenizer(text).input_ids) <= CONTEXT
    assert tokenizer.unk_token_id not in tokenizer("zyx qfw").input_ids[1:-1]


def test_interrupted_training_continues_exactly(tmp_path: Path) -> None:
    def run(file: Path, stops: list[int]) -> nn.Module:
        torch.manual_seed(0)
        module = nn.Linear(3, 1)

        def loss_at(step: int) -> Tensor:
            if stops and step == stops[0]:
                stops.pop()
                raise KeyboardInterrupt
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            return (module(x) - x.sum(1, keepdim=True)).square().mean()

        train("toy", module, loss_at, steps=600, learning_rate=1e-2, state_file=file, ema_decay=0.9)
        return module

    whole = run(tmp_path / "whole.pt", [])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts.pt", [400])
    resumed = run(tmp_path / "parts.pt", [])
    assert torch.equal(whole.weight, resumed.weight)


def test_spoilt_captions_differ_in_a_claim() -> None:
    rng = random.Random(0)
    for _ in range(300):
        scene = sample_scene(rng)
        truth = describe(scene, rng)
        assert spoil(truth, rng).text != truth.text


def test_phrases_point_at_their_nouns_and_say_what_they_claim() -> None:
    tokenizer = build_tokenizer(0, captions=3000)
    rng = random.Random(0)
    for _ in range(200):
        description = describe(sample_scene(rng), rng)
        text = description.text
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
        found = phrases(text)
        assert sum(item.number + 1 for item in found) == len(description.objects)
        for item in found:
            noun = tokens[item.token].removesuffix("</w>")
            assert noun in {SHAPES[item.shape] + ending for ending in ("", "s", "es")}
            size = [*SIZES, None][item.size]
            assert ObjectPhrase(
                shape=SHAPES[item.shape], color=list(COLORS)[item.color], size=size
            ) in (description.objects)


def test_the_reader_learns_to_read(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(0, captions=3000)
    rng = random.Random(1)
    captions = [describe(sample_scene(rng), rng) for _ in range(64)]
    tokens = tokenize(tokenizer, [caption.text for caption in captions])
    torch.manual_seed(0)
    reader = Reader(new_text_encoder(tokenizer))
    losses = []
    optimizer = torch.optim.AdamW(reader.parameters(), 3e-3)
    for _ in range(15):
        losses.append(reader(tokens, captions))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    assert set(reader.noun) == set(QUESTIONS)


def test_text_tower_of_the_reward_equals_the_text_encoder() -> None:
    tokenizer = build_tokenizer(0, captions=500)
    encoder = new_text_encoder(tokenizer).eval()
    settings = model_config(tokenizer)["model_cfg"]
    text_cfg = settings["text_cfg"] | {"hf_tokenizer_name": None}
    model = open_clip.CLIP(**(settings | {"text_cfg": text_cfg})).eval()
    assert not model.load_state_dict(text_tower(encoder), strict=False).unexpected_keys
    tokens = tokenize(tokenizer, ["a red circle above a blue star", "two green crosses"])
    with torch.no_grad():
        end = encoder(tokens).last_hidden_state[torch.arange(2), tokens.argmax(-1)]
        torch.testing.assert_close(model.encode_text(tokens), end @ model.text_projection)


def test_tokenizer_is_the_same_in_every_process() -> None:
    """A text encoder read back by a later process must find its words at the same ids."""
    code = (
        "import json; from mmalign.shapes.build.tokenizer import build_tokenizer;"
        "print(json.dumps(build_tokenizer(0, captions=500).get_vocab()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == build_tokenizer(0, captions=500).get_vocab()


def test_shipped_models_read_the_ids_they_were_trained_on() -> None:
    built = build_tokenizer(0).get_vocab()
    models = as_path("pkg://mmalign.shapes/models")
    for part in ("sd/tokenizer", "lcm/tokenizer"):
        assert CLIPTokenizer.from_pretrained(models / part).get_vocab() == built
    shipped = json.loads((models / "clip" / "tokenizer.json").read_text())["model"]["vocab"]
    assert {word: built[word] for word in shipped} == shipped


def test_spoilt_scenes_are_wrong_or_unclean() -> None:
    rng = random.Random(0)
    wrong = unclean = 0
    for _ in range(300):
        scene = sample_scene(rng)
        truth = describe(scene, rng)
        spoilt = spoil_scene(scene, truth, rng)
        assert spoilt != scene
        holds = all(truth.claims(spoilt).values())
        wrong += not holds
        unclean += holds
    assert wrong > 200
    assert unclean < 60


def test_spoilt_captions_turn_places_around() -> None:
    rng = random.Random(0)
    turned = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
    seen = set()
    for _ in range(200):
        truth = describe(sample_scene(rng, num_objects=1), rng)
        if truth.place:
            word = truth.place.split()[-1]
            assert spoil(truth, rng, layout_share=1.0).text == truth.text.replace(
                word, turned[word]
            )
            seen.add(word)
    assert seen == set(turned)


def test_decoded_scenes_are_described_truly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoded, "COUNT", 12)
    generator = StableDiffusionPipeline.from_pretrained(as_path("pkg://mmalign.shapes/models/sd"))
    data = decoded.DecodedScenes(generator, 0, tmp_path)
    chosen, pictures = data.batch(random.Random(0), 6)
    scenes, spoilt, blends, _ = pictures.chunk(4)
    rendered = pixels([data.scenes[index] for index in chosen])
    near_misses = pixels([data.spoilt[index] for index in chosen])
    assert (scenes - rendered).abs().mean() < 0.02
    # A blend is nearer to either side than the sides are to each other.
    apart = (scenes - spoilt).abs().mean()
    assert (blends - rendered).abs().mean() < apart
    assert (blends - near_misses).abs().mean() < apart
    for index in range(12):
        truth = data.describe(index, random.Random(index))
        assert all(truth.claims(data.scenes[index]).values())
        assert not all(truth.claims(data.spoilt[index]).values())
    again = decoded.DecodedScenes(generator, 0, tmp_path).batch(random.Random(0), 6)
    assert torch.equal(again[1], pictures)


@pytest.mark.parametrize(("share", "layout"), [(0.0, 1 - 0.6 ** (2 / 3)), (0.5, 0.644)])
def test_layout_share_moves_timesteps_up(share: float, layout: float) -> None:
    """Half of 0.289, the share of the falling density above 600, and half of 1."""
    timesteps = draw_timesteps(1000, 40_000, torch.Generator().manual_seed(0), share)
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    assert (timesteps >= 600).float().mean().item() == pytest.approx(layout, abs=0.01)


def test_built_models_load_by_plain_upstream_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_to_image, "SCENES", 64)
    monkeypatch.setattr(decoded, "COUNT", 24)
    work, output = tmp_path / "work", tmp_path / "models"
    tokenizer = build_tokenizer(0, captions=3000)
    encoder = build_text_encoder(tokenizer, work, 0, steps=2)
    vae = build_autoencoder(work, 0, steps=2)
    stages = [Stage("first", 2, 1e-3, 0.9, 0.0), Stage("second", 2, 1e-3, 0.9, 0.5)]
    generator = build_generator(vae, tokenizer, encoder, work, 0, stages)
    refine_decoder(vae, work, 0, steps=2)
    save_pipeline(generator, output / "sd")
    save_pipeline(build_student(generator, work, 0, steps=2), output / "lcm")
    reward = build_reward(tokenizer, encoder, generator, work, 0, steps=(1, 2))
    save_reward(reward, tokenizer, output / "clip")
    write_prompts(tmp_path / "prompts")
    write_hashes(output)

    loaded = StableDiffusionPipeline.from_pretrained(output / "sd")
    assert loaded.text_encoder.dtype == loaded.unet.dtype == torch.float32
    student = LatentConsistencyModelPipeline.from_pretrained(output / "lcm")
    prompts = (tmp_path / "prompts" / "held_out.txt").read_text().splitlines()
    for pipeline in (loaded, student):
        quality = prompt_following(
            pipeline, prompts[:2], seed=0, num_inference_steps=2, guidance_scale=3.0
        )
        assert quality["correct"] == 0  # two training steps draw no scene
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{output / 'clip'}")
    tokens = open_clip.get_tokenizer(f"local-dir:{output / 'clip'}")(prompts[:2])
    assert model.encode_text(tokens).shape == (2, 128)
    assert callable(preprocess)
    assert "sd/unet/diffusion_pytorch_model.safetensors" in (output / "SHA256SUMS").read_text()
