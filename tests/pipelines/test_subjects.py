"""What `mmalign evaluate image` compares: models and folders, their names, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from compared_models import PROMPTS, FakeAdapter, paint, read
from PIL import Image

from mmalign import cli
from mmalign.config import (
    EvaluateImageConfig,
    SubjectConfig,
)
from mmalign.data.files import write_jsonl
from mmalign.pipelines import _subject_images, evaluate_image
from mmalign.pipelines._subjects import list_subjects, read_short
from mmalign.types import InputError


def test_folders_alone_need_no_prompts_and_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_subject_images, "load_adapter", None)
    light = [("a", (200, 200, 200)), ("b", (210, 200, 200)), ("a", (9, 9, 9))]
    paint(tmp_path / "light", light)
    paint(tmp_path / "dark", [("b", (50, 50, 50)), ("a", (60, 50, 50))])
    folders = [str(tmp_path / "dark"), f"better={tmp_path / 'light'}"]
    arguments = ["evaluate", "image", "--compare", *folders]
    arguments += ["--evaluation.judge.name", "brightness", "--output_dir", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["subjects"] == ["dark", "better"]
    assert results["win_rates"][0]["wins"] == 2
    said = "".join(capsys.readouterr())
    assert "1 instead of 4 images of each prompt" in said
    assert "1 images of better are left out" in said


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (PROMPTS[:1], "subject dark: .* has no image of '<b>two</b> blue squares'"),
        (["other"], "has no image of 'a red circle' and 1 more of 2 prompts"),
    ],
)
def test_folder_without_a_prompt(
    several: EvaluateImageConfig, tmp_path: Path, pictures: list[str], message: str
) -> None:
    folder = paint(tmp_path / "new", [(prompt, (1, 2, 3)) for prompt in pictures])
    several.subjects[3].images = str(folder)
    with pytest.raises(InputError, match=message):
        evaluate_image.run(several)
    assert FakeAdapter.sampled == []


def test_folder_that_says_nothing_or_the_same_twice(
    several: EvaluateImageConfig, tmp_path: Path
) -> None:
    metadata = tmp_path / "dark" / "metadata.jsonl"
    lines = metadata.read_text().splitlines()
    metadata.write_text("\n".join([*lines, lines[0]]))
    with pytest.raises(InputError, match=r"names 0\.png twice for the prompt 'a red circle'"):
        evaluate_image.run(several)
    metadata.unlink()
    with pytest.raises(InputError, match=r"dark has no metadata\.jsonl that says which image"):
        evaluate_image.run(several)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(prompt for prompt in PROMPTS for _ in range(2)))
    several.subjects[3].prompts = str(names)
    evaluate_image.run(several)
    assert len(read(several, "scores.json")) == 16


def test_images_outside_the_folder_are_refused(
    several: EvaluateImageConfig, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    row = {"file_name": "../secret.png", "prompt": PROMPTS[0]}
    write_jsonl(tmp_path / "dark" / "metadata.jsonl", [row])
    with pytest.raises(InputError, match=r"'\.\.' is not allowed"):
        evaluate_image.run(several)


def test_what_a_short_form_means(tmp_path: Path) -> None:
    run, lora, model = tmp_path / "run", tmp_path / "lora", tmp_path / "sd"
    for folder in (run / "adapter", lora, model):
        folder.mkdir(parents=True)
    (run / "summary.json").write_text("{}")
    (lora / "pytorch_lora_weights.safetensors").touch()
    (model / "model_index.json").write_text("{}")
    pictures = paint(tmp_path / "pictures", [("a", (1, 1, 1))])
    assert read_short("base") == SubjectConfig(name="base")
    assert read_short("plain=base") == SubjectConfig(name="plain")
    assert read_short(str(run)) == SubjectConfig(name="run", adapter=str(run / "adapter"))
    assert read_short(f"dpo={lora}") == SubjectConfig(name="dpo", adapter=str(lora))
    assert read_short(str(model)) == SubjectConfig(model=str(model))
    assert read_short(str(pictures)) == SubjectConfig(images=str(pictures))
    assert read_short("some/sdxl-turbo") == SubjectConfig(model="some/sdxl-turbo")
    for wrong in ("nothing", str(tmp_path), "=x"):
        with pytest.raises(InputError, match=r"^compare: "):
            read_short(wrong)


def test_subjects_that_cannot_be(comparison: EvaluateImageConfig) -> None:
    def refused(*subjects: SubjectConfig) -> str:
        comparison.subjects = list(subjects)
        with pytest.raises(InputError) as caught:
            list_subjects(comparison)
        return str(caught.value)

    assert "with --compare or subjects, name them there" in refused(SubjectConfig())
    comparison.adapter = None
    assert "at least two" in refused(SubjectConfig())
    assert "two subjects are called 'base'" in refused(SubjectConfig(), SubjectConfig())
    both = SubjectConfig(name="x", model="m/n", images="pictures")
    assert "either a model or a folder" in refused(SubjectConfig(), both)
    stray = SubjectConfig(name="x", adapter="bright", prompts="p.txt")
    assert "prompts says what its images are" in refused(SubjectConfig(), stray)


def test_names_and_options_of_subjects(comparison: EvaluateImageConfig) -> None:
    comparison.adapter, comparison.variant = None, "fp16"
    comparison.subjects = [
        SubjectConfig(adapter="runs/dpo/adapter"),
        SubjectConfig(model="owner/other", num_inference_steps=4, guidance_scale=1.5),
        SubjectConfig(name="Other!", images="pictures"),
    ]
    first, second, third = list_subjects(comparison)
    assert [first.name, second.name, third.name] == ["dpo", "other", "Other!"]
    assert [first.slug, second.slug, third.slug] == ["dpo", "other", "other-2"]
    assert first.model is not None
    assert (first.model.model, first.model.variant) == (comparison.model, "fp16")
    assert second.model is not None
    assert (second.model.model, second.model.variant) == ("owner/other", None)
    assert (second.sampling.num_inference_steps, second.sampling.guidance_scale) == (4, 1.5)
    assert first.sampling == comparison.sampling


def test_nothing_to_compare(comparison: EvaluateImageConfig) -> None:
    comparison.adapter = None
    with pytest.raises(InputError, match="nothing to compare"):
        evaluate_image.run(comparison)


def test_missing_and_empty_prompts(comparison: EvaluateImageConfig, tmp_path: Path) -> None:
    comparison.evaluation.prompts = None
    with pytest.raises(InputError, match=r"evaluation\.prompts is missing"):
        evaluate_image.run(comparison)
    (tmp_path / "empty.txt").write_text("")
    comparison.evaluation.prompts = str(tmp_path / "empty.txt")
    with pytest.raises(InputError, match=r"empty\.txt"):
        evaluate_image.run(comparison)


def test_yaml_and_flags_go_together(tmp_path: Path, fails: Callable[..., str]) -> None:
    file = tmp_path / "three.yaml"
    file.write_text("subjects: [{name: base}, {name: x, adaptor: y}]")
    assert "unknown key subjects[1].adaptor" in fails("--config", file)
    file.write_text("subjects: [{name: base}, {name: x, images: absent}]")
    assert "subjects[1].images: no such file or folder: absent" in fails("--config", file)
    assert "expected one of" in fails("--judge", "people")


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*argv: object) -> str:
        assert cli.main(["evaluate", "image", *map(str, argv)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    return run
