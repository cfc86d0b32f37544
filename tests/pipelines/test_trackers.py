"""What arrives at the trackers of `report_to`, and that the local log is written besides."""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmalign import cli
from mmalign.accelerator import _tracker_options, tracking
from mmalign.config import (
    TRACKERS,
    DraftConfig,
    EvalConfig,
    LoraConfig,
    RewardConfig,
    SamplingConfig,
)
from mmalign.pipelines import draft
from mmalign.types import InputError

BRIGHT, SATURATED = RewardConfig(name="brightness"), RewardConfig(name="saturation")


def config(model: Path, folder: Path, tracker: str) -> DraftConfig:
    prompts = folder / "prompts.txt"
    prompts.write_text("red\na red\n")
    return DraftConfig(
        model=str(model),
        output_dir=str(folder / "run"),
        device="cpu",
        offline=True,
        prompts=str(prompts),
        rewards=[BRIGHT],
        lora=LoraConfig(rank=2),
        sampling=SamplingConfig(num_inference_steps=2),
        max_steps=2,
        per_device_train_batch_size=1,
        report_to=[tracker],
        evaluation=EvalConfig(
            prompts=str(prompts),
            images_per_prompt=1,
            rewards=[BRIGHT],
            judge=SATURATED,
            every_steps=2,
        ),
    )


def logged(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]


def test_tensorboard_gets_metrics_evaluations_images_and_options(
    tiny_sd: Path, tmp_path: Path
) -> None:
    draft.run(config(tiny_sd, tmp_path, "tensorboard"))
    events = EventAccumulator(str(tmp_path / "run" / "mmalign")).Reload()
    local = {line["step"]: line["loss"] for line in logged(tmp_path, "metrics.jsonl")}
    assert {e.step: e.value for e in events.Scalars("loss")} == pytest.approx(local)
    (evaluated,) = events.Scalars("evaluation/brightness")
    assert (evaluated.step, evaluated.value) == (
        2,
        pytest.approx(logged(tmp_path, "evaluations.jsonl")[-1]["brightness"]),
    )
    picture = events.Images("evaluation/images")[0]
    assert (picture.step, picture.width, picture.height) == (2, 32, 16)
    (options,) = (tmp_path / "run" / "mmalign").glob("*/hparams.yml")
    stored = yaml.safe_load(options.read_text())
    assert (stored["max_steps"], stored["sampling.num_inference_steps"]) == (2, 2)


def test_wandb_stays_off_the_network_when_told_to(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = config(tiny_sd, tmp_path, "wandb")
    assert _tracker_options(options)["wandb"] == {
        "name": "run",
        "dir": options.output_dir,
        "mode": "offline",
    }
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    draft.run(options)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [line["step"] for line in logged(tmp_path, "metrics.jsonl")] == [1, 2]


def test_trackio_gets_the_metrics(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    draft.run(config(tiny_sd, tmp_path, "trackio"))
    assert list((tmp_path / "trackio").glob("mmalign*.db"))
    assert [line["step"] for line in logged(tmp_path, "metrics.jsonl")] == [1, 2]


def test_a_resumed_run_goes_on_where_it_was_tracked(tmp_path: Path) -> None:
    fresh = config(tmp_path, tmp_path, "wandb")
    resumed = replace(fresh, offline=False, resume_from_checkpoint="latest")
    assert "resume" not in _tracker_options(fresh)["trackio"]
    assert _tracker_options(resumed)["trackio"] == {"name": "run", "resume": "allow"}
    assert "id" not in _tracker_options(resumed)["wandb"]
    for name in ("run-20260101_000000-abc123", "offline-run-20260102_000000-def456"):
        (tmp_path / "run" / "wandb" / name).mkdir(parents=True)
    os.utime(tmp_path / "run" / "wandb" / "run-20260101_000000-abc123", (0, 0))
    options = _tracker_options(resumed)["wandb"]
    assert (options["id"], options["resume"]) == ("def456", "allow")


def test_a_tracker_that_does_not_start_is_one_line(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise ConnectionError("no answer\nfrom the server")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", fail)
    with pytest.raises(
        InputError, match=r"^report_to: tensorboard did not start: no answer from the server$"
    ):
        draft.run(config(tiny_sd, tmp_path, "tensorboard"))


def test_offline_keeps_trackio_off_servers(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_SPACE_ID", "somebody/metrics")
    accelerator = Accelerator(cpu=True)
    options = config(tiny_sd, tmp_path, "trackio")
    with pytest.raises(InputError, match="offline: TRACKIO_SPACE_ID is set"):
        tracking(accelerator, options).__enter__()


@pytest.mark.parametrize("tracker", TRACKERS)
def test_missing_tracker_is_one_line_that_names_the_extra(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tracker: str,
) -> None:
    monkeypatch.setattr("mmalign.preflight.is_installed", lambda name: name != tracker)
    out = f"--output_dir={tmp_path / 'run'}"
    assert (
        cli.main(["train", "draft", "--config", "shapes_draft", "--report_to", tracker, out]) == 2
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: report_to: {tracker} is not installed;"
        f" pip install 'mmalign[{tracker}]', or leave it out"
    )
    assert not (tmp_path / "run").exists()


def test_every_tracker_has_an_extra() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))
    extras = project["project"]["optional-dependencies"]
    assert sorted(extras) == sorted([*TRACKERS, "deepspeed"])
