"""The vision-language quickstart: its trial by hand, and the whole of it in small."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mmalign.config import (
    GenerationConfig,
    QuickstartVlmConfig,
    ShapesPicturesConfig,
    TopicOverwriteConfig,
    TrialConfig,
    VlmDpoConfig,
)
from mmalign.pipelines import quickstart_vlm, shapes_pictures
from mmalign.pipelines._speech_trial import SpeechTrial, Spoken
from mmalign.pipelines._vlm_trial import load_trial
from mmalign.shapes.companions import scene_set
from mmalign.shapes.parser import parse_image
from mmalign.shapes.questions import YES, read_question
from mmalign.shapes.speech import DESCRIBE, facts_of
from mmalign.types import InputError, Question


class Speaker:
    """Describes every picture truly, with an invention at the end; answers rightly or yes."""

    def __init__(self, invention: str, *, agreeable: bool) -> None:
        self.invention, self.agreeable = invention, agreeable

    def generate(self, questions: Sequence[Question], config: GenerationConfig) -> list[str]:
        assert {question.prompt for question in questions} == {DESCRIBE[0]}
        scenes = [parse_image(question.images[0]).scene for question in questions]  # type: ignore[arg-type]
        told = [" ".join(fact.sentence() for fact in facts_of(scene)) for scene in scenes]
        return [f"{text} {self.invention}".strip() for text in told]

    def yes_no(self, questions: Sequence[Question], batch_size: int) -> list[tuple[float, float]]:
        right = [
            read_question(q.prompt).answer(parse_image(q.images[0]).scene) == YES  # type: ignore[arg-type]
            for q in questions
        ]
        return [(0.9, 0.1) if self.agreeable or yes else (0.2, 0.8) for yes in right]


def test_the_trial_measures_what_changed() -> None:
    trial = SpeechTrial(count=12, seed=0, generation=GenerationConfig())
    before = trial.listen(Speaker("There is a red star.", agreeable=True))  # type: ignore[arg-type]
    after = trial.listen(Speaker("", agreeable=False))  # type: ignore[arg-type]
    result = trial.compare(before, after, shown=3)
    red_stars = sum("red star" in caption for caption in after.captions)
    assert result.before["chair_s"] == pytest.approx((12 - red_stars) / 12)
    assert result.after["chair_s"] == 0
    assert result.before["coverage"] == result.after["coverage"] == 1
    assert (result.before["yes_no_accuracy"], result.before["yes_rate"]) == (0.5, 1)
    assert (result.after["yes_no_accuracy"], result.after["yes_rate"]) == (1, 0.5)
    assert result.changes["length"] == (-5, -5)
    assert result.after["shapes_objects_f1"] == 1
    assert result.win_rate.wins == 12 - red_stars
    assert result.win_rate.value == 1
    marked = [text for item in result.answers for text, wrong in item.before if wrong]
    assert set(marked) == {"red star"}
    assert not any(wrong for item in result.answers for _, wrong in item.after)
    assert len(result.answers) == 3


def test_marked_captions_are_whole() -> None:
    trial = SpeechTrial(count=2, seed=0, generation=GenerationConfig())
    said = Spoken(["A red star and a blue star.", ""], ["Yes"] * 8)
    result = trial.compare(said, said, shown=2)
    assert ["".join(text for text, _ in item.before) for item in result.answers] == said.captions


@pytest.mark.parametrize(
    ("trial", "message"),
    [
        (TrialConfig(name="shape"), "'shape' is unknown: did you mean 'shapes'"),
        (TrialConfig(options={"scenes": 3}), "trial.options: shapes: .*'scenes'"),
        (TrialConfig(name="json:Nothing"), "cannot import 'json:Nothing'"),
    ],
)
def test_an_unusable_trial_is_one_line(trial: TrialConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_trial(VlmDpoConfig(trial=trial))


def test_questions_show_training_pictures(tmp_path: Path) -> None:
    shapes_pictures.run(ShapesPicturesConfig(output=str(tmp_path), count=3, seed=1))
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [DESCRIBE[0]] * 3
    assert len({row["id"] for row in rows}) == 3
    assert all((tmp_path / row["image"]).is_file() for row in rows)
    assert not any(scene.held_out for scene in scene_set("train", 3, 1))


def test_the_quickstart_goes_all_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = quickstart_vlm._settings

    def small(config_class: type[Any], name: str, *flags: str) -> Any:
        topics = config_class is TopicOverwriteConfig
        short = ["--responses=3"] if topics else ["--max_steps=2", "--save_steps=2"]
        return settings(config_class, name, *flags, *short)

    monkeypatch.setattr(quickstart_vlm, "_settings", small)
    monkeypatch.setattr(quickstart_vlm, "QUESTIONS", 6)
    monkeypatch.setattr(quickstart_vlm, "SCENES", 6)
    quickstart_vlm.run(QuickstartVlmConfig(output_dir=str(tmp_path)))
    summary = json.loads((tmp_path / "summary.json").read_text())
    for side in (summary["before"], summary["after"]):
        assert {"chair_s", "chair_i", "coverage", "length", "yes_no_accuracy", "yes_rate"} <= set(
            side
        )
    assert summary["steps"] == 2
    assert summary["win_rate"]["judge"] == "shapes_objects_f1"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    page = (tmp_path / "report.html").read_text()
    assert page.count('<article class="pair">') == 6
    assert "http" not in page.split("</style>")[1].replace("http-equiv", "")
