"""Measured quality of the captioner: the numbers on the model card."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from mmalign.shapes.companions import Probe, missing_companions, probe_set, scene_set
from mmalign.shapes.hallucination import caption_metrics, question_metrics, read_yes_no
from mmalign.shapes.questions import Query, read_question
from mmalign.shapes.render import render
from mmalign.shapes.scene import Scene
from mmalign.shapes.speech import DESCRIBE, Fact, facts_of, read

BATCH = 50
NEW_TOKENS = 120


def load(folder: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load the saved model as a user would."""
    model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def reply(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    **generation: object,
) -> list[str]:
    """Answer one prompt per image, greedily unless `generation` says otherwise."""
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **generation}
    answers: list[str] = []
    for start in tqdm(range(0, len(prompts), BATCH), desc="speak"):
        part = slice(start, start + BATCH)
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
            for prompt in prompts[part]
        ]
        inputs = processor(
            images=list(images[part]),
            text=[processor.apply_chat_template(c, add_generation_prompt=True) for c in chats],
            return_tensors="pt",
            padding=True,
        )
        tokens = model.generate(**inputs, **settings)[:, inputs.input_ids.shape[1] :]
        answers += processor.batch_decode(tokens, skip_special_tokens=True)
    return answers


def speech_quality(folder: Path, seed: int, scenes: int = 500) -> dict[str, float]:
    """Measure captions, yes/no answers and wh-answers on held-out scenes, greedily."""
    model, processor = load(folder)
    chosen = scene_set("held_out", scenes, seed)
    pictures = [render(scene) for scene in chosen]
    captions = reply(model, processor, pictures, [DESCRIBE[0]] * scenes)
    probes = probe_set(chosen, seed)
    answers = reply(
        model, processor, [pictures[p.scene_index] for p in probes], [p.prompt for p in probes]
    )
    measured = caption_metrics(chosen, captions)
    measured |= question_metrics([probe.truth for probe in probes], answers)
    values = {name: interval.value for name, interval in measured.items()}
    values |= _accuracies(chosen, probes, answers)
    values["claims"] = _true_claims(chosen, captions)
    rng = random.Random(f"{seed}/wh")
    queries = [_wh_question(scene, rng) for scene in chosen]
    said = reply(model, processor, pictures, [query.text for query in queries])
    truths = [query.answer(scene) for query, scene in zip(queries, chosen, strict=True)]
    values["wh_accuracy"] = sum(map(str.__eq__, said, truths)) / scenes
    return {**values, "scenes": scenes}


def _accuracies(
    scenes: Sequence[Scene], probes: Sequence[Probe], answers: Sequence[str]
) -> dict[str, float]:
    """Share of right answers by kind of question, and where one asks for a missing companion."""
    right: dict[str, list[bool]] = {}
    for probe, answer in zip(probes, answers, strict=True):
        verdict = read_yes_no(answer) == probe.truth
        right.setdefault(f"{probe.kind}_accuracy", []).append(verdict)
        if read_question(probe.prompt).about in _companions(scenes[probe.scene_index]):
            right.setdefault("companion_accuracy", []).append(verdict)
    return {name: sum(verdicts) / len(verdicts) for name, verdicts in right.items()}


def _companions(scene: Scene) -> list[Fact]:
    return [Fact(color=color, shape=shape) for color, shape in missing_companions(scene)]


def _true_claims(scenes: Sequence[Scene], captions: Sequence[str]) -> float:
    """Share of sentences that are true in all they say, unreadable ones not; NaN without any."""
    verdicts = []
    for scene, caption in zip(scenes, captions, strict=True):
        try:
            verdicts += [statement.holds(scene) for statement in read(caption)]
        except ValueError:
            verdicts.append(False)
    return sum(verdicts) / len(verdicts) if verdicts else math.nan


def _wh_question(scene: Scene, rng: random.Random) -> Query:
    """Ask for one attribute of one object of the scene."""
    fact = rng.choice(facts_of(scene))
    asked = rng.choice(("shape", "color", "size", "place", "what"))
    given = {
        "shape": {"color": fact.color},
        "color": {"shape": fact.shape},
        "what": {"place": fact.place},
    }.get(asked, {"shape": fact.shape, "color": fact.color})
    return Query(asked=asked, about=Fact(**given))  # type: ignore[arg-type]
