"""`mmalign evaluate image`: what is compared, what is measured, and what is refused."""

from __future__ import annotations

import csv
import json
import re
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmalign import cli
from mmalign.config import (
    EvalConfig,
    EvaluateImageConfig,
    ModelConfig,
    RewardConfig,
    SamplingConfig,
    SubjectConfig,
)
from mmalign.data.files import write_jsonl
from mmalign.evaluation import plan
from mmalign.pipelines import _subject_images, evaluate_image
from mmalign.pipelines._evaluation import Judges, judge_rewards, measure, sample_side
from mmalign.pipelines._subjects import list_subjects, read_short
from mmalign.rewards.brightness import LUMA
from mmalign.types import InputError

PROMPTS = ["a red circle", "<b>two</b> blue squares"]


class FakeAdapter:
    """Noise by seed; an adapter makes it brighter by its scale."""

    loaded: ClassVar[list[weakref.ref[FakeAdapter]]] = []
    sampled: ClassVar[list[str]] = []

    def __init__(self, config: ModelConfig) -> None:
        assert not any(one() for one in self.loaded), "two models in memory"
        self.loaded.append(weakref.ref(self))
        self.me = self  # as real ones, it goes only when cycles are collected
        self.gain = 0.2 * config.adapter_scale if config.adapter == "bright" else 0.0

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: SamplingConfig
    ) -> Tensor:
        self.sampled.extend(prompts)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = [torch.rand(3, 8, 8, generator=generator) for generator in generators]
        return torch.stack(noise) * 0.5 + self.gain


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluateImageConfig:
    def load(config: ModelConfig, *, device: str, for_training: bool) -> FakeAdapter:
        assert not for_training
        return FakeAdapter(config)

    monkeypatch.setattr(_subject_images, "load_adapter", load)
    monkeypatch.setattr(FakeAdapter, "loaded", [])
    monkeypatch.setattr(FakeAdapter, "sampled", [])
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return EvaluateImageConfig(
        adapter="bright",
        device="cpu",
        output_dir=str(tmp_path / "run"),
        sampling=SamplingConfig(seed=3, batch_size=3),
        evaluation=EvalConfig(
            prompts=str(tmp_path / "prompts.txt"),
            images_per_prompt=2,
            rewards=[RewardConfig(name="saturation")],
            judge=RewardConfig(name="brightness"),
        ),
    )


@pytest.fixture
def several(config: EvaluateImageConfig, tmp_path: Path) -> EvaluateImageConfig:
    """Base, two adapters of different strength, and a folder of dark pictures."""
    paint(tmp_path / "dark", [(prompt, (10, 5, 5)) for prompt in PROMPTS for _ in range(2)])
    config.adapter = None
    config.subjects = [
        SubjectConfig(name="base"),
        SubjectConfig(name="<i>weak</i>", adapter="bright", adapter_scale=0.5),
        SubjectConfig(name="strong", adapter="bright"),
        SubjectConfig(name="dark", images=str(tmp_path / "dark")),
    ]
    return config


def paint(folder: Path, pictures: Sequence[tuple[str, tuple[int, int, int]]]) -> Path:
    folder.mkdir()
    rows = []
    for number, (prompt, color) in enumerate(pictures):
        Image.new("RGB", (6 + 2 * number, 8), color).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "prompt": prompt})
    write_jsonl(folder / "metadata.jsonl", rows)
    return folder


def read(config: EvaluateImageConfig, name: str) -> Any:
    return json.loads((Path(config.output_dir) / name).read_text(encoding="utf-8"))


def win_rates(config: EvaluateImageConfig, judge: str) -> dict[tuple[str, str], Any]:
    found = read(config, "results.json")["win_rates"]
    return {(row["subject"], row["against"]): row for row in found if row["judge"] == judge}


def test_writes_summary_report_and_images(config: EvaluateImageConfig, capfd: Any) -> None:
    evaluate_image.run(config)
    folder = Path(config.output_dir)
    summary = read(config, "summary.json")
    assert summary["method"] == "evaluate"
    assert (summary["model"], summary["seed"]) == (config.model, 3)
    assert set(summary["before"]) == {"saturation", "brightness", "diversity"}
    gain = summary["after"]["brightness"] - summary["before"]["brightness"]
    assert gain == pytest.approx(0.2, abs=1e-3)  # pixels are rounded to 8 bits
    assert summary["metrics"] == summary["after"]
    low, high = summary["ci95"]["brightness"]
    assert low <= summary["metrics"]["brightness"] <= high
    assert summary["win_rate"]["value"] == 1.0
    assert (summary["win_rate"]["judge"], summary["win_rate"]["n"]) == ("brightness", 4)
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;two&lt;/b&gt; blue squares" in report
    assert "<b>two" not in report
    assert not re.search(r'(src|href)="(?!data:)', report)
    assert report.count("data:image/png;base64,") == 8  # two prompts, and two best cases
    out = "".join(capfd.readouterr())
    assert "after over before: win rate 1.00 [1.00, 1.00] by brightness: 4 wins, 0 losses" in out
    assert "saturation" in out
    assert not (folder / "README.md").exists()


def test_samples_are_the_evaluated_images(config: EvaluateImageConfig) -> None:
    evaluate_image.run(config)
    samples = Path(config.output_dir) / "samples"
    rows = [json.loads(line) for line in (samples / "metadata.jsonl").read_text().splitlines()]
    prompts, seeds = plan(PROMPTS, 2, 3)
    assert [(row["prompt"], row["seed"]) for row in rows] == list(zip(prompts, seeds, strict=True))
    expected = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(seeds[3])) * 0.5
    image = np.array(Image.open(samples / rows[3]["before_file_name"])).astype(float) / 255
    np.testing.assert_allclose(image, expected.permute(1, 2, 0), atol=0.51 / 255)


def test_scale_applies_to_the_adapter_alone(config: EvaluateImageConfig) -> None:
    config.base_adapter, config.adapter, config.adapter_scale = "bright", "dim", 0.5
    evaluate_image.run(config)
    summary = read(config, "summary.json")
    gain = summary["after"]["brightness"] - summary["before"]["brightness"]
    assert gain == pytest.approx(-0.2, abs=1e-3)


def test_several_models_and_a_folder(several: EvaluateImageConfig, capfd: Any) -> None:
    evaluate_image.run(several)
    rates = win_rates(several, "brightness")
    assert len(rates) == 6
    assert rates["strong", "base"]["value"] == rates["strong", "<i>weak</i>"]["value"] == 1.0
    assert rates["dark", "base"]["value"] == 0.0
    # Two prompts of which all images agree: each side is as likely in a quarter of the flips.
    assert {row["p"] for row in rates.values()} == {0.5}
    assert {row["p_holm"] for row in rates.values()} == {1.0}
    metrics = read(several, "results.json")["metrics"]
    assert metrics["brightness"]["strong"]["change"]["value"] == pytest.approx(0.2, abs=1e-3)
    assert metrics["brightness"]["base"]["change"] is None
    assert metrics["diversity"]["dark"]["value"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["diversity"]["base"]["value"] > 0.1
    page = (Path(several.output_dir) / "report.html").read_text(encoding="utf-8")
    assert "6 pairs of subjects" in page
    assert "(Holm)" in page
    assert "&lt;i&gt;weak&lt;/i&gt;" in page
    assert "<i>weak" not in page
    out = "".join(capfd.readouterr())
    assert "strong over base: win rate 1.00" in out
    assert "corrected for the 6 pairs" in out


def test_models_share_prompts_seeds_and_noise(several: EvaluateImageConfig) -> None:
    several.subjects[1].adapter = None  # the same model twice makes the same pictures
    evaluate_image.run(several)
    samples = Path(several.output_dir) / "samples"
    for number in range(4):
        name = f"{number:05d}.png"
        assert (samples / "base" / name).read_bytes() == (samples / "i-weak-i" / name).read_bytes()
    row = win_rates(several, "brightness")["<i>weak</i>", "base"]
    assert (row["value"], row["ties"], row["p"]) == (None, 4, 1.0)


def test_every_score_of_every_image_is_written(several: EvaluateImageConfig) -> None:
    evaluate_image.run(several)
    folder = Path(several.output_dir)
    table = read(several, "scores.json")
    with (folder / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(table) == len(rows) == 16
    for row, record in zip(rows, table, strict=True):
        assert {key: str(value) for key, value in record.items()} == row
        pixels = np.array(Image.open(folder / row["file_name"])).astype(float) / 255
        luma = (pixels @ LUMA).mean()
        assert float(row["brightness"]) == pytest.approx(luma, abs=1e-5)
    assert {row["prompt"] for row in rows} == set(PROMPTS)
    assert list(rows[0])[:5] == ["subject", "file_name", "prompt", "number", "seed"]


def test_baseline_is_chosen_by_name(several: EvaluateImageConfig) -> None:
    several.baseline = "strong"
    evaluate_image.run(several)
    assert read(several, "results.json")["baseline"] == "strong"
    assert win_rates(several, "brightness")["base", "strong"]["value"] == 0.0
    several.baseline = "stronger"
    with pytest.raises(InputError, match="no subject is called 'stronger': base, "):
        evaluate_image.run(several)


def test_cases_are_the_largest_gains_and_losses(
    config: EvaluateImageConfig, tmp_path: Path
) -> None:
    prompts = [f"prompt {number}" for number in range(9)]
    gray = [(prompt, (100, 100, 100)) for prompt in prompts]
    other = [(prompt, (100 + 10 * (n - 4),) * 3) for n, prompt in enumerate(prompts)]
    config.adapter = None
    config.compare = [f"a={paint(tmp_path / 'a', gray)}", f"b={paint(tmp_path / 'b', other)}"]
    config.evaluation.prompts = None
    evaluate_image.run(config)
    page = (Path(config.output_dir) / "report.html").read_text(encoding="utf-8")
    best, worst = page.partition("largest gains")[2].partition("largest losses")[::2]
    assert re.findall(r"<p>(prompt \d)</p>", best) == [
        "prompt 8",
        "prompt 7",
        "prompt 6",
        "prompt 5",
    ]
    found = re.findall(r"<p>(prompt \d)</p>", worst.partition("<h2>")[0])
    assert found == ["prompt 0", "prompt 1", "prompt 2", "prompt 3"]


def test_images_are_made_once(several: EvaluateImageConfig) -> None:
    evaluate_image.run(several)
    first = len(FakeAdapter.sampled)
    evaluate_image.run(several)
    assert len(FakeAdapter.sampled) == first == 12
    several.subjects[2].adapter_scale = 2.0
    Path(several.output_dir, "samples", "base", "00001.png").unlink()
    evaluate_image.run(several)  # only what has changed, and what is missing
    assert FakeAdapter.sampled[first:] == ["a red circle", *PROMPTS[:1] * 2, *PROMPTS[1:] * 2]
    assert win_rates(several, "brightness")["strong", "<i>weak</i>"]["value"] == 1.0


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


def test_subjects_that_cannot_be(config: EvaluateImageConfig) -> None:
    def refused(*subjects: SubjectConfig) -> str:
        config.subjects = list(subjects)
        with pytest.raises(InputError) as caught:
            list_subjects(config)
        return str(caught.value)

    assert "with --compare or subjects, name them there" in refused(SubjectConfig())
    config.adapter = None
    assert "at least two" in refused(SubjectConfig())
    assert "two subjects are called 'base'" in refused(SubjectConfig(), SubjectConfig())
    both = SubjectConfig(name="x", model="m/n", images="pictures")
    assert "either a model or a folder" in refused(SubjectConfig(), both)
    stray = SubjectConfig(name="x", adapter="bright", prompts="p.txt")
    assert "prompts says what its images are" in refused(SubjectConfig(), stray)


def test_names_and_options_of_subjects(config: EvaluateImageConfig) -> None:
    config.adapter, config.variant = None, "fp16"
    config.subjects = [
        SubjectConfig(adapter="runs/dpo/adapter"),
        SubjectConfig(model="owner/other", num_inference_steps=4, guidance_scale=1.5),
        SubjectConfig(name="Other!", images="pictures"),
    ]
    first, second, third = list_subjects(config)
    assert [first.name, second.name, third.name] == ["dpo", "other", "Other!"]
    assert [first.slug, second.slug, third.slug] == ["dpo", "other", "other-2"]
    assert first.model is not None
    assert (first.model.model, first.model.variant) == (config.model, "fp16")
    assert second.model is not None
    assert (second.model.model, second.model.variant) == ("owner/other", None)
    assert (second.sampling.num_inference_steps, second.sampling.guidance_scale) == (4, 1.5)
    assert first.sampling == config.sampling


def test_nothing_to_compare(config: EvaluateImageConfig) -> None:
    config.adapter = None
    with pytest.raises(InputError, match="nothing to compare"):
        evaluate_image.run(config)


def test_missing_and_empty_prompts(config: EvaluateImageConfig, tmp_path: Path) -> None:
    config.evaluation.prompts = None
    with pytest.raises(InputError, match=r"evaluation\.prompts is missing"):
        evaluate_image.run(config)
    (tmp_path / "empty.txt").write_text("")
    config.evaluation.prompts = str(tmp_path / "empty.txt")
    with pytest.raises(InputError, match=r"empty\.txt"):
        evaluate_image.run(config)


def test_bad_judge_is_found_before_sampling(
    config: EvaluateImageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_subject_images, "load_adapter", None)
    config.evaluation.judge = RewardConfig(name="brightnes")
    with pytest.raises(InputError, match="did you mean 'brightness'"):
        evaluate_image.run(config)


def test_judge_with_metrics_and_words(
    several: EvaluateImageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_image, "load_judges", lambda *_: Judges([], Wordy()))
    evaluate_image.run(several)
    metrics = read(several, "results.json")["metrics"]
    assert (metrics["correct"]["strong"]["value"], metrics["correct"]["dark"]["value"]) == (
        1.0,
        0.0,
    )
    page = (Path(several.output_dir) / "report.html").read_text(encoding="utf-8")
    assert "too &lt;dark&gt;" in page
    assert "too <dark>" not in page


class Wordy:
    """A judge that says more than a number."""

    name = "wordy"

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        return samples.mean(dim=(1, 2, 3))

    def metrics(self, samples: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"correct": (self(samples, prompts) > 0.4).float()}

    def verdicts(self, samples: Tensor, prompts: Sequence[str]) -> list[str]:
        return ["bright" if value > 0.4 else "too <dark>" for value in self(samples, prompts)]


def test_training_without_evaluation() -> None:
    config: Any = EvalConfig()
    adapter: Any = None
    assert judge_rewards(config, "auto") == Judges([], None)
    assert sample_side(adapter, config, SamplingConfig(), "sample") is None
    assert measure(None, None, config, Judges([], None), 0) is None


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
