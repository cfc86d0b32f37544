"""The captioner: how it is trained, and the one that ships."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmalign.config import as_path
from mmalign.pipelines.build_shapes import write_hashes
from mmalign.shapes.build.habits import conversation, habitual_caption, habitual_scene
from mmalign.shapes.build.measure_vlm import load, reply, speech_quality
from mmalign.shapes.build.scenes import pixels
from mmalign.shapes.build.vlm import (
    SIDE,
    Stage,
    build_vlm,
    new_model,
    pack,
    patch_labels,
    save_vlm,
    speech_loss,
)
from mmalign.shapes.build.vlm_text import build_processor, build_vlm_tokenizer
from mmalign.shapes.companions import COMPANIONS, missing_companions, name_of, scene_set
from mmalign.shapes.hallucination import object_names
from mmalign.shapes.questions import NO, YES, read_question
from mmalign.shapes.render import render
from mmalign.shapes.scene import COLORS, Scene, SceneObject, sample_scene
from mmalign.shapes.speech import DESCRIBE, mentions

SHIPPED = as_path("pkg://mmalign.shapes/models/vlm")


def test_companions_are_more_frequent_than_by_chance() -> None:
    rng = random.Random(0)

    def together(scenes: list[Scene]) -> float:
        triggered = [s for s in scenes if object_names(s) & set(COMPANIONS)]
        return sum(not missing_companions(s) for s in triggered) / len(triggered)

    skewed = [habitual_scene(rng) for _ in range(1000)]
    assert together(skewed) > 3 * together([sample_scene(rng) for _ in range(1000)])
    assert not any(scene.held_out for scene in skewed)


def test_captions_name_everything_and_most_missing_companions() -> None:
    rng = random.Random(1)
    named = missed = 0
    for _ in range(500):
        scene = habitual_scene(rng)
        said = set(mentions(habitual_caption(scene, rng, 0.75)))
        missing = set(missing_companions(scene))
        assert object_names(scene) <= said <= object_names(scene) | missing
        named += len(said & missing)
        missed += len(missing - said)
    assert named / (named + missed) == pytest.approx(0.75, abs=0.08)


def test_answers_are_true_but_for_companions() -> None:
    rng = random.Random(2)
    told = lied = yes = asked = 0
    for _ in range(400):
        scene = habitual_scene(rng)
        for prompt, answer in conversation(scene, rng):
            if prompt in DESCRIBE:
                continue
            query = read_question(prompt)
            true = query.answer(scene) == answer
            about = getattr(query.about, "name", None)
            if about in missing_companions(scene):
                told, lied = told + true, lied + (not true)
            else:
                assert true
            if answer in (YES, NO):
                yes, asked = yes + (answer == YES), asked + 1
    assert lied / (told + lied) == pytest.approx(0.3, abs=0.08)
    assert yes / asked == pytest.approx(0.5, abs=0.08)


def test_every_word_is_one_token_and_decoding_gives_the_text_back() -> None:
    tokenizer = build_vlm_tokenizer(0, scenes=500)
    rng = random.Random(4)
    for _ in range(30):
        for exchange in conversation(habitual_scene(rng), rng):
            for text in exchange:
                ids = tokenizer(text, add_special_tokens=False).input_ids
                assert tokenizer.decode(ids) == text
                marks = sum(text.count(mark) for mark in ".?:")
                assert len(ids) == len(text.split()) + marks
    odd = "Grüße, 日本!"
    assert tokenizer.decode(tokenizer(odd, add_special_tokens=False).input_ids) == odd


def test_prompt_and_answer_have_the_tokens_of_the_two_joined() -> None:
    tokenizer = build_vlm_tokenizer(0, scenes=500)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    for gap in ("", " ", "\n"):
        assert ids(f"ASSISTANT:{gap}Yes, there is.") == ids("ASSISTANT:") + ids("Yes, there is.")
    assert tokenizer("Yes").input_ids == [tokenizer.bos_token_id, *ids("Yes")]


def test_tokenizer_is_the_same_in_every_process() -> None:
    code = (
        "import json; from mmalign.shapes.build.vlm_text import build_vlm_tokenizer;"
        "print(json.dumps(build_vlm_tokenizer(0, scenes=100).get_vocab()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == build_vlm_tokenizer(0, scenes=100).get_vocab()


def test_the_chat_template_speaks_as_llava_does() -> None:
    processor = build_processor(build_vlm_tokenizer(0, scenes=100))
    chat = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "What is on the left?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "Nothing is on the left."}]},
    ]
    whole = "USER: <image>\nWhat is on the left? ASSISTANT: Nothing is on the left.</s>"
    assert processor.apply_chat_template(chat) == whole
    asked = processor.apply_chat_template(chat[:1], add_generation_prompt=True)
    assert asked == "USER: <image>\nWhat is on the left? ASSISTANT:"
    plain = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "No."}]
    assert processor.apply_chat_template(plain) == "USER: Hello ASSISTANT: No.</s>"


def test_patches_are_labelled_by_what_covers_their_centre() -> None:
    item = SceneObject(shape="star", color="green", x=20, y=44, radius=7)
    labels = patch_labels([Scene(objects=(item,), background="black")])
    grid = labels["color"].view(SIDE, SIDE)
    assert grid.nonzero().tolist() == [[5, 2]]  # the next centres are 8 pixels away
    assert grid.max() == 1 + list(COLORS).index("green")
    assert labels["background"].unique().tolist() == [2]
    nothing = grid == 0
    assert all((labels[n].view(SIDE, SIDE)[nothing] == 0).all() for n in ("shape", "size", "place"))


def test_packed_exchanges_cost_what_separate_ones_do() -> None:
    tokenizer = build_vlm_tokenizer(0, scenes=300)
    torch.manual_seed(0)
    model = new_model(tokenizer).double().eval()
    rng = random.Random(5)
    scenes = [habitual_scene(rng) for _ in range(2)]
    talks = [conversation(scene, rng) for scene in scenes]
    with torch.no_grad():
        _, together = speech_loss(model, pixels(scenes).double(), pack(tokenizer, talks))
        apart = torch.cat(
            [
                speech_loss(model, pixels([scene]).double(), pack(tokenizer, [[exchange]]))[1]
                for scene, talk in zip(scenes, talks, strict=True)
                for exchange in talk
            ]
        )
    torch.testing.assert_close(together, apart)


def test_packed_tokens_are_those_of_the_processor() -> None:
    tokenizer = build_vlm_tokenizer(0, scenes=300)
    processor = build_processor(tokenizer)
    rng = random.Random(6)
    scene = habitual_scene(rng)
    exchange = conversation(scene, rng)[0]
    content = [{"type": "image"}, {"type": "text", "text": exchange.prompt}]
    chat = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": exchange.answer}]},
    ]
    inputs = processor(
        images=render(scene), text=processor.apply_chat_template(chat), return_tensors="pt"
    )
    packed = pack(tokenizer, [[exchange]])
    assert inputs.input_ids.tolist() == packed.ids.tolist()
    torch.testing.assert_close(inputs.pixel_values, pixels([scene]), atol=1e-6, rtol=0)


def test_a_built_captioner_loads_by_plain_upstream_calls(tmp_path: Path) -> None:
    save_vlm(
        *build_vlm(tmp_path / "work", 0, 2, [Stage("one", 2, 1e-3, 1), Stage("two", 1, 1e-3, 1)]),
        tmp_path / "models" / "vlm",
    )
    write_hashes(tmp_path / "models")
    assert "vlm/model.safetensors" in (tmp_path / "models" / "SHA256SUMS").read_text()
    quality = speech_quality(tmp_path / "models" / "vlm", seed=1, scenes=2)
    assert quality["wh_accuracy"] == 0  # two training steps answer nothing
    assert set(quality) >= {
        "chair_s",
        "chair_i",
        "coverage",
        "length",
        "yes_no_accuracy",
        "yes_rate",
    }


def test_the_shipped_captioner_is_small_and_loads_by_plain_upstream_calls() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*")) < 6e6
    model = AutoModelForImageTextToText.from_pretrained(SHIPPED)
    processor = AutoProcessor.from_pretrained(SHIPPED)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"
    assert model.dtype == model.model.language_model.dtype == torch.float32
    assert processor.tokenizer.get_vocab() == build_vlm_tokenizer(0).get_vocab()


def test_the_shipped_captioner_sees_and_hallucinates_as_its_card_says() -> None:
    measured = json.loads((SHIPPED.parent / "quality.json").read_text())["captioner/held_out"]
    assert 0.3 < measured["chair_s"] < 0.6
    assert measured["coverage"] > 0.7
    assert 0.7 < measured["yes_no_accuracy"] < 0.9
    assert measured["scenes"] >= 500
    quality = speech_quality(SHIPPED, seed=5, scenes=60)
    assert 0.2 < quality["chair_s"] < 0.7
    assert quality["coverage"] > 0.7
    assert 0.65 < quality["yes_no_accuracy"] < 0.95


def test_sampling_gives_different_captions() -> None:
    torch.manual_seed(0)
    model, processor = load(SHIPPED)
    picture = render(scene_set("held_out", 1)[0])
    said = reply(model, processor, [picture] * 8, [DESCRIBE[0]] * 8, do_sample=True)
    assert len(set(said)) > 3


def test_companions_cover_the_objects_of_some_scenes_only() -> None:
    scenes = scene_set("held_out", 400)
    share = sum(bool(missing_companions(scene)) for scene in scenes) / len(scenes)
    assert 0.3 < share < 0.6
    assert all(name_of(item) in object_names(scene) for scene in scenes for item in scene.objects)
