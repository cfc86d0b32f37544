"""Options from the defaults, a YAML file and flags; whatever is wrong with them is one line."""

from __future__ import annotations

import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmalign import cli, config

PAIRS = ["--pairs.path", "."]


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace every pipeline by one that keeps the configuration it was given."""
    configs: list[Any] = []

    def load(name: str) -> types.SimpleNamespace:
        assert name.startswith("mmalign.pipelines.")
        return types.SimpleNamespace(run=configs.append)

    monkeypatch.setattr(cli, "importlib", types.SimpleNamespace(import_module=load))
    # The embedded model is not needed to see what reaches a pipeline.
    monkeypatch.setattr("mmalign.preflight._check_model", lambda name, value: None)
    monkeypatch.setattr("mmalign.preflight._check_contents", lambda config: None)
    return configs


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "options.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_default_then_yaml_then_flag(tmp_path: Path, received: list[Any]) -> None:
    path = yaml_file(tmp_path, "learning_rate: 1e-4\nmax_steps: 7\npairs:\n  resolution: 64\n")
    flags = ["--learning_rate", "0.5", "--config", path, *PAIRS]
    assert cli.main(["train", "diffusion-dpo", *flags]) == 0
    (got,) = received
    assert isinstance(got, config.DiffusionDpoConfig)
    assert (got.learning_rate, got.max_steps, got.seed) == (0.5, 7, 0)
    assert (got.pairs.resolution, got.pairs.path) == (64, ".")


def test_yaml_exponent_without_a_point_is_a_number(tmp_path: Path, received: list[Any]) -> None:
    path = yaml_file(tmp_path, "learning_rate: 1e-4\nadam_epsilon: 1E-7\nbeta: 5000\n")
    assert cli.main(["train", "diffusion-dpo", "--config", path, *PAIRS]) == 0
    assert (received[0].learning_rate, received[0].adam_epsilon) == (1e-4, 1e-7)
    assert received[0].beta == 5000.0
    assert isinstance(received[0].beta, float)


def test_optional_section_from_yaml_and_flags(tmp_path: Path, received: list[Any]) -> None:
    path = yaml_file(tmp_path, "curriculum:\n  num_buckets: 3\n")
    cli.main(["train", "diffusion-dpo", *PAIRS])
    cli.main(["train", "diffusion-dpo", *PAIRS, "--curriculum.stage_steps", "9"])
    cli.main(["train", "diffusion-dpo", "--config", path, *PAIRS, "--curriculum.stage_steps", "9"])
    cli.main(["train", "diffusion-dpo", "--config", path, *PAIRS, "--curriculum", "null"])
    none, flag, both, off = (got.curriculum for got in received)
    assert none is None
    assert flag == config.CurriculumConfig(stage_steps=9)
    assert both == config.CurriculumConfig(num_buckets=3, stage_steps=9)
    assert off is None


def test_list_of_rewards_from_yaml_and_flags(tmp_path: Path, received: list[Any]) -> None:
    text = (
        "evaluation:\n  rewards:\n  - name: clip\n  - {name: jpeg, weight: 2}\n  judge: {name: j}\n"
    )
    path = yaml_file(tmp_path, text)
    train = ["train", "diffusion-dpo", *PAIRS]
    cli.main([*train, "--config", path, "--evaluation.judge.weight", "3"])
    cli.main([*train, "--evaluation.rewards", "[{name: a}, {name: b, options: {k: 1}}]"])
    cli.main([*train, "--evaluation.rewards.name", "clip", "--evaluation.rewards.weight", "4"])
    cli.main([*train, "--config", path, "--evaluation.rewards+", "{name: c}"])
    reward = config.RewardConfig
    first, second, third, fourth = (got.evaluation for got in received)
    assert first.rewards == [reward(name="clip"), reward(name="jpeg", weight=2.0)]
    assert first.judge == reward(name="j", weight=3.0)
    assert second.rewards == [reward(name="a"), reward(name="b", options={"k": 1})]
    assert third.rewards == [reward(name="clip", weight=4.0)]
    assert [r.name for r in fourth.rewards] == ["clip", "jpeg", "c"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--prompt", "a red circle, top: left"], ["a red circle, top: left"]),
        (["--prompt", "a", "b", "--prompt", "c"], ["a", "b", "c"]),
        (["--prompt", "[a, 'b, c']"], ["a", "b, c"]),
        (["--prompt", "[not closed"], ["[not closed"]),
        (["--prompt=--dashes"], ["--dashes"]),
    ],
)
def test_lists_of_strings(received: list[Any], flags: list[str], expected: list[str]) -> None:
    assert cli.main(["generate", *flags]) == 0
    assert received[0].prompt == expected


def test_flag_forms(received: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    cli.main(["generate", "--offline", "--adapter_scale", "-1.5", "--sampling.seed=4"])
    cli.main(["generate", "--offline", "false", "--revision", "2024-01-01", "--model", "123"])
    cli.main(
        ["score", "--reward", "clip", "--options.clip.path", "x", "--images", ".", "--prompts", "."]
    )
    first, second, third = received
    assert (first.offline, first.adapter_scale, first.sampling.seed) == (True, -1.5, 4)
    assert (second.offline, second.revision, second.model) == (False, "2024-01-01", "123")
    assert third.options == {"clip": {"path": "x"}}
    cli.main(["generate", "--variant=~/x"])
    assert received[-1].variant == "/somewhere/x"


def test_packaged_config_by_name(received: list[Any]) -> None:
    assert cli.main(["train", "diffusion-dpo", "--config", "sd15_diffusion_dpo", *PAIRS]) == 0
    assert received[0].model != config.DiffusionDpoConfig().model


def test_resolved_config_reads_back(tmp_path: Path, received: list[Any]) -> None:
    train = ["train", "diffusion-dpo", *PAIRS]
    cli.main([*train, "--curriculum.num_buckets", "3", "--evaluation.rewards.name", "clip"])
    path = yaml_file(tmp_path, config.dump_config(received[0]))
    cli.main(["train", "diffusion-dpo", "--config", path])
    assert received[1] == received[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown key learning_rat; the nearest is learning_rate"),
        ("rank: 4", "unknown key rank; the nearest is lora.rank"),
        ("pairs:\n  resolutio: 4", "unknown key pairs.resolutio; the nearest is pairs.resolution"),
        (
            "evaluation:\n  rewards:\n  - {name: a}\n  - {nam: b}",
            "unknown key evaluation.rewards[1].nam; the nearest is evaluation.rewards.name",
        ),
        ("curriculum: {bucket: 3}", "unknown key curriculum.bucket; the nearest is curriculum."),
        ("- learning_rate", "expected a mapping of option names to values, found a list"),
        ("just text", "expected a mapping of option names to values, found a str"),
        ("", "expected a mapping of option names to values, found nothing"),
        ("a: [", "not valid YAML"),
        ("seed: 1\nseed: 2", "not valid YAML: line 2: key 'seed' is given twice"),
        ("seed: " + "9" * 5000, "not valid YAML: Exceeds the limit"),
        ("seed: 2026-99-99", "not valid YAML: month must be in 1..12"),
        ("? [a, b]\n: 1", "not valid YAML"),
        ("max_steps: 10.5", "max_steps: expected int, got 10.5"),
        ("max_steps: many", "max_steps: expected int, got many"),
        ("max_steps:", "max_steps: expected a value, got nothing"),
        ("on_nan: ignore", "on_nan: expected one of 'stop', 'skip', got ignore"),
        ("curriculum: {num_buckets: x}", "curriculum: num_buckets: expected int, got x"),
        ("pairs: folder", "pairs: expected a mapping of options, got 'folder'"),
        ("pairs:", "pairs: expected a value, got nothing"),
        ("evaluation: {rewards: clip}", "evaluation.rewards: expected a list, got 'clip'"),
        ("evaluation: {rewards: [clip]}", "evaluation.rewards[0]: expected a mapping"),
        ("report_to: tensorboard", "report_to: expected list, got tensorboard"),
        ("seed: !!python/object/apply:os.system ['touch marker']", "not valid YAML"),
    ],
)
def test_wrong_yaml(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: Callable[..., str],
    text: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = yaml_file(tmp_path, text)
    assert fails("train", "diffusion-dpo", "--config", path).startswith(f"{path}: {message}")
    assert os.listdir(tmp_path) == ["options.yaml"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rat", "1"], "unknown option --learning_rat; the nearest is --learning_rate"),
        (["--pairs.resolutio=1"], "unknown option --pairs.resolutio; the nearest is --pairs.resol"),
        (["--pairs", "some.jsonl"], "--pairs: is a section of options, not 'some.jsonl': write --"),
        (["--seed", "x"], "seed: expected int, got x"),
        (["--seed"], "--seed: its value is missing"),
        (["--seed", "1", "2"], "--seed: expected one value, got 2: 1 2"),
        (["--seed", "null"], "seed: expected int, got"),
        (["extra"], "unexpected argument 'extra'"),
        (["-s", "1"], "unexpected argument '-s'"),
        (["--config", "absent"], "--config: no such file: absent; --help lists packaged ones"),
        (
            ["--config", "sd15_drat"],
            "--config: no such file: sd15_drat; the nearest packaged",
        ),
        (["--config"], "--config: its value is missing"),
        (["--mixed_precision", "fp8"], "mixed_precision: expected one of 'no', 'fp16', 'bf16'"),
    ],
)
def test_wrong_flags(fails: Callable[..., str], flags: list[str], message: str) -> None:
    assert fails("train", "diffusion-dpo", *flags).startswith(message)


def test_config_of_another_command(fails: Callable[..., str]) -> None:
    message = "is for another command: unknown keys seeds, budget, curve_points; --help has all"
    assert message in fails("train", "diffusion-dpo", "--config", "shapes_compare")


@pytest.mark.parametrize("command", ["validate", "stats"])
def test_path_of_pairs_may_stand_alone(command: str, received: list[Any], tmp_path: Path) -> None:
    assert cli.main(["pairs", command, str(tmp_path)]) == 0
    assert received[0].path == str(tmp_path)
