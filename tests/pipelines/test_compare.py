"""`mmalign compare`: what runs, what is skipped, what a failure does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from mmalign.config import BudgetConfig, CompareConfig, MethodConfig
from mmalign.pipelines import _compare_runs, compare
from mmalign.pipelines._compare_runs import Runner, Task, threads_each
from mmalign.types import InputError

FORWARDS_PER_STEP = 96


VLM_SUMMARY = {
    "before": {"chair_s": 0.3, "coverage": 0.9, "judged": 0.5},
    "after": {"chair_s": 0.1, "coverage": 0.88, "judged": 0.6},
    "win_rate": {"value": 0.8, "wins": 8, "losses": 2, "ties": 1, "judge": "judged"},
}


class FakeProcess:
    """Stands for `mmalign ...`: writes the summary that the command would, or fails."""

    calls: list[list[str]]
    fail: set[str]

    def __init__(self, command: list[str], *, stdout: Any, env: dict[str, str], **_: Any) -> None:
        self.arguments = command[3:]
        type(self).calls.append(self.arguments)
        flags = dict(part[2:].partition("=")[::2] for part in self.arguments if "=" in part)
        place = flags.get("output_dir", flags.get("output", ""))
        self.returncode = int(any(name in place for name in type(self).fail))
        if self.returncode:
            stdout.write(b"10%|#  |\rerror: it broke\n")
        elif self.arguments[0] == "train":
            steps = int(flags["max_steps"])
            tokens = {"cost": {"tokens_forward": 100 * steps, "train_seconds": 2.0 * steps}}
            vlm = self.arguments[1] == "vlm-dpo"
            summary = (
                {"steps": steps, **VLM_SUMMARY, **tokens}
                if vlm
                else {
                    "steps": steps,
                    "before": {"clip": 0.5, "exact": 0.5},
                    "after": {"clip": 0.6, "exact": 0.6},
                    "win_rate": {"value": 0.6, "wins": 6, "losses": 4, "ties": 0, "judge": "exact"},
                    "cost": {
                        "unet_forwards": steps * FORWARDS_PER_STEP,
                        "reward_queries": 0,
                        "train_seconds": 0.5 * steps,
                    },
                }
            )
            (Path(place) / "summary.json").write_text(json.dumps(summary))

    def poll(self) -> int:
        return self.returncode


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    FakeProcess.calls, FakeProcess.fail = [], set()
    monkeypatch.setattr(_compare_runs.subprocess, "Popen", FakeProcess)
    monkeypatch.setattr(_compare_runs, "POLL_SECONDS", 0)
    return FakeProcess.calls


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("red\na red\nred red\n")
    return file


def comparison(tmp_path: Path, prompts: Path, **more: Any) -> CompareConfig:
    pairs = tmp_path / "build.yaml"
    pairs.write_text(
        f"prompts: {prompts}\ncandidates_per_prompt: 4\n"
        "sampling: {num_inference_steps: 5, guidance_scale: 2.0}\n"
    )
    methods = [
        MethodConfig(name="online", train="draft"),
        MethodConfig(name="offline", train="diffusion-dpo", pairs=str(pairs)),
        MethodConfig(name="other", train="mapo", pairs=str(pairs)),
    ]
    options: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"),
        "seeds": 2,
        "budget": BudgetConfig(unit="unet_forwards", amount=1000),
        "prompts": str(prompts),
        "methods": methods,
    }
    return CompareConfig(**{**options, **more})


def steps(calls: list[list[str]], name: str) -> set[str]:
    return {
        part
        for call in calls
        for part in call
        if part.startswith("--max_steps") and any(f"/{name}/seed" in other for other in call)
    }


def test_budget_pays_for_pairs_first(calls: list[list[str]], prompts: Path, tmp_path: Path) -> None:
    compare.run(comparison(tmp_path, prompts))
    # Pairs: 3 prompts x 4 candidates x 5 steps x 2 = 120 forwards, shared by both methods.
    kinds = [" ".join(call[:2]) for call in calls]
    assert kinds.count("pairs build") == 2
    assert kinds[:2] == ["pairs build"] * 2
    assert len(calls) == 2 + 3 + 6
    assert steps(calls, "online") == {"--max_steps=10"}  # 1000 / 96
    assert steps(calls, "offline") == {"--max_steps=9"}  # (1000 - 120) / 96
    found = {
        m["name"]: m for m in json.loads((tmp_path / "out/results.json").read_text())["methods"]
    }
    assert found["offline"]["metrics"]["cost/unet_forwards"]["mean"] == 9 * 96 + 120
    assert found["offline"]["metrics"]["cost/reward_queries"]["mean"] == 12
    assert found["online"]["metrics"]["cost/unet_forwards"]["mean"] == 10 * 96


def answering(tmp_path: Path, **more: Any) -> CompareConfig:
    methods = [
        MethodConfig(
            name=name,
            train="vlm-dpo",
            config="shapes_vlm_dpo",
            pairs="shapes_topics",
            options={"preset": name, "trial": {"name": "shapes"}},
        )
        for name in ("dpo", "mdpo")
    ]
    options: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"),
        "seeds": 2,
        "budget": BudgetConfig(unit="steps", amount=3),
        "prompts": "pictures/{seed}/questions.jsonl",
        "methods": methods,
    }
    return CompareConfig(**{**options, **more})


def test_vision_language_methods_share_pairs_of_topics(
    calls: list[list[str]], tmp_path: Path
) -> None:
    compare.run(answering(tmp_path))
    kinds = [call[:2] for call in calls]
    assert kinds == [["pairs", "topics"]] * 2 + [["train", "vlm-dpo"]] * 4
    for seed, call in enumerate(calls[:2]):
        assert f"--questions=pictures/{seed}/questions.jsonl" in call
        assert {f"--seed={seed}", f"--sampling.seed={seed}", f"--resampling.seed={seed}"} < {*call}
        folder = next(part for part in call if part.startswith("--output_dir=")).partition("=")[2]
        trained = [train for train in calls[2:] if f"--pairs.path={folder}/pairs.jsonl" in train]
        assert len(trained) == 2
        assert all(f"--seed={seed}" in train for train in trained)
    table = (tmp_path / "out" / "results.md").read_text()
    head, _, row = table.splitlines()[:3]
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert cells["CHAIR_s"].startswith("10.0 %")
    assert cells["coverage"].startswith("\u22122.0")
    assert cells["tokens"] == "300"
    assert "reward" not in cells
    assert "rows through the denoiser" not in table


def test_a_unit_that_a_method_does_not_count_is_named(
    calls: list[list[str]], tmp_path: Path
) -> None:
    unit = BudgetConfig(unit="reward_queries", amount=100)
    with pytest.raises(InputError, match=r"dpo does not count reward_queries; use steps, tokens_f"):
        compare.run(answering(tmp_path, budget=unit))
    probe = calls[-1]
    assert "--trial=null" in probe


def test_complete_runs_are_skipped(calls: list[list[str]], prompts: Path, tmp_path: Path) -> None:
    config = comparison(tmp_path, prompts)
    compare.run(config)
    done = len(calls)
    (tmp_path / "out/other/seed-1/summary.json").write_text('{"half": ')
    compare.run(config)
    assert len(calls) == done + 1
    assert calls[-1] in calls[:done]
    assert "--resume_from_checkpoint=latest" in calls[-1]


def test_folder_of_other_options_is_refused(
    calls: list[list[str]], prompts: Path, tmp_path: Path
) -> None:
    compare.run(comparison(tmp_path, prompts))
    with pytest.raises(InputError, match=r"run of other options .*learning_rate"):
        compare.run(comparison(tmp_path, prompts, options={"learning_rate": 0.5}))


@pytest.mark.parametrize("edited", ["build.yaml", "train.yaml", "prompts.txt"])
def test_edited_files_are_other_options(
    calls: list[list[str]], prompts: Path, tmp_path: Path, edited: str
) -> None:
    train = tmp_path / "train.yaml"
    train.write_text("beta: 100\n")
    config = comparison(tmp_path, prompts)
    config.methods = [replace(config.methods[1], config=str(train))]
    compare.run(config)
    done = len(calls)
    compare.run(config)
    assert len(calls) == done
    before = {*(tmp_path / "out/pairs").iterdir()}
    file = tmp_path / edited
    text = {"train.yaml": "beta: 9999\n", "prompts.txt": "red\na red\nblue\n"}
    file.write_text(text.get(edited, file.read_text().replace("prompt: 4", "prompt: 3")))
    with pytest.raises(InputError, match="holds a run of other options"):
        compare.run(config)
    assert (len({*(tmp_path / "out/pairs").iterdir()} - before) == 1) == (edited != "train.yaml")


def test_failure_is_one_line_and_stops_nothing_else(
    calls: list[list[str]], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FakeProcess.fail = {"online/seed-1"}
    with pytest.raises(SystemExit) as stop:
        compare.run(comparison(tmp_path, prompts))
    assert stop.value.code == 1
    log = tmp_path / "out" / "online" / "seed-1" / "run.log"
    lines = capsys.readouterr().out.splitlines()
    assert f"online seed 1 failed (exit code 1): error: it broke; log: {log}" in lines
    assert "1 of 6 runs are missing from the results" in lines
    table = (tmp_path / "out" / "results.md").read_text()
    seeds = {line.split(" | ")[0]: line for line in table.splitlines()}
    assert "| 1 (1 failed) |" in seeds["| online"]
    assert "| 2 |" in seeds["| other"]


def test_failed_pairs_and_probe_stop_their_methods_only(
    calls: list[list[str]], prompts: Path, tmp_path: Path
) -> None:
    FakeProcess.fail = {"pairs/build", "online/probe"}
    with pytest.raises(SystemExit):
        compare.run(comparison(tmp_path, prompts))
    assert not any("/seed-" in part for call in calls for part in call if call[0] == "train")
    FakeProcess.fail = set()
    compare.run(comparison(tmp_path, prompts))  # what failed is tried again
    assert steps(calls, "offline")


def test_budget_too_small_is_said_before_anything_runs(
    calls: list[list[str]], prompts: Path, tmp_path: Path
) -> None:
    budget = BudgetConfig(unit="unet_forwards", amount=100)
    with pytest.raises(InputError, match="pairs of offline alone need 120"):
        compare.run(comparison(tmp_path, prompts, budget=budget))
    assert calls == []


def test_steps_need_no_probe(calls: list[list[str]], prompts: Path, tmp_path: Path) -> None:
    compare.run(comparison(tmp_path, prompts, budget=BudgetConfig(unit="steps", amount=5)))
    assert not any(part.endswith("/probe") for call in calls for part in call)
    assert steps(calls, "offline") == steps(calls, "online") == {"--max_steps=5"}


def test_termination_ends_the_runs_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = subprocess.Popen
    started: list[subprocess.Popen[bytes]] = []

    def sleeping(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        started.append(real([sys.executable, "-c", "import time; time.sleep(60)"], **options))
        return started[0]

    monkeypatch.setattr(_compare_runs.subprocess, "Popen", sleeping)
    handler = signal.getsignal(signal.SIGTERM)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with tqdm(disable=True) as bar, pytest.raises(SystemExit) as stop:
        Runner(1, bar).run([Task("a", ["train"], tmp_path, lambda: False)])
    assert stop.value.code == 143
    assert started[0].poll() is not None
    assert signal.getsignal(signal.SIGTERM) is handler


def test_threads_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert [threads_each(n) for n in (1, 3, 16)] == [8, 2, 1]
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert threads_each(2) == 3


def test_two_real_methods_and_one_that_fails(
    tiny_sd: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    brightness = [{"name": "brightness"}]
    config = CompareConfig(
        output_dir=str(tmp_path / "out"),
        seeds=1,
        processes=2,
        budget=BudgetConfig(unit="steps", amount=2),
        model=str(tiny_sd),
        prompts=str(prompts),
        evaluation={
            "prompts": str(prompts),
            "images_per_prompt": 2,
            "rewards": brightness,
            "judge": {"name": "saturation"},
        },
        options={
            "rewards": brightness,
            "device": "cpu",
            "offline": True,
            "lora.rank": 2,
            "sampling.num_inference_steps": 3,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.01,
        },
        curve_points=2,
        methods=[
            MethodConfig(name="draft", train="draft"),
            MethodConfig(name="d3po", train="d3po"),
            MethodConfig(name="broken", train="draft", options={"rewards": [{"name": "jpeg"}]}),
        ],
    )
    with pytest.raises(SystemExit):
        compare.run(config)
    out = capsys.readouterr().out
    assert "broken seed 0 failed (exit code 2): error: rewards: draft needs" in out
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    methods = {method["name"]: method for method in content["methods"]}
    for name in ("draft", "d3po"):
        assert methods[name]["metrics"]["after/kl"]["mean"] > 0
        assert methods[name]["metrics"]["cost/unet_forwards"]["mean"] > 0
        assert [row["step"] for row in methods[name]["curve"]] == [0, 1, 2]
    # The same base on the same prompts and seeds.
    befores = [
        json.loads((tmp_path / "out" / name / "seed-0" / "summary.json").read_text())["before"]
        for name in ("draft", "d3po")
    ]
    assert befores[0] == befores[1]
    assert (tmp_path / "out" / "report.html").read_text().count("<svg") == 6
