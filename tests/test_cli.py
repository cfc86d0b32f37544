from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign import cli, config
from mmalign.types import InputError

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


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must end with exit code 2 and one line on stderr; returns that line."""

    def run(*argv: str) -> str:
        assert cli.main(argv) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err.removeprefix("error: ").rstrip("\n")

    return run


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "options.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@dataclass
class Finished:
    code: int
    out: str
    err: str
    cpu_seconds: float
    imported: set[str]


def run_process(*argv: str, cwd: Path) -> Finished:
    """Run the real command and report CPU time and every module it imported."""
    program = (
        "import atexit, sys\n"
        "sys.argv = ['mmalign', *sys.argv[1:]]\n"
        "atexit.register(lambda: open('modules', 'w').write('\\n'.join(sys.modules)))\n"
        "from mmalign.cli import main\n"
        "sys.exit(main())\n"
    )
    with (cwd / "out").open("w") as out, (cwd / "err").open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *argv], stdout=out, stderr=err, cwd=cwd
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return Finished(
        process.returncode,
        (cwd / "out").read_text(),
        (cwd / "err").read_text(),
        usage.ru_utime + usage.ru_stime,
        set((cwd / "modules").read_text().split()),
    )


HEAVY = {"torch", "diffusers", "transformers", "accelerate", "open_clip", "peft", "datasets"}


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["--help"], 0, "quickstart image"),
        (["train", "diffusion-dpo", "--help"], 0, "--learning_rate"),
        (["train", "diffusion-dpo", "--learning_rat", "1"], 2, "learning_rate"),
        (["train", "diffusion-dpo", "--config", "absent.yaml"], 2, "no such file"),
        (["train", "diffusion-dpo", "--model", ".", "--pairs.path", "absent"], 2, "absent"),
        (["pairs", "validate", "--path", "absent"], 2, "absent"),
        (["pairs", "label", "--help"], 0, "usage: mmalign pairs label [IMAGES] "),
        (["pairs", "label", "absent"], 2, "images: no such file or folder: absent"),
        (["pairs", "label", "pairs"], 2, "metadata.jsonl line 1"),
        (["train", "mapo", "--model", ".", "--pairs.path", "pairs"], 2, "metadata.jsonl"),
        (["generate", "--model", ".", "--prompts", "prompts.txt"], 2, "prompts.txt line 2"),
        (["pairs", "validate", "--path", "pairs"], 2, "bad row"),
    ],
)
def test_answers_at_once_without_torch(
    tmp_path: Path, argv: list[str], code: int, text: str
) -> None:
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "metadata.jsonl").write_text('{"prompt": "a", "chosen": \n')
    (tmp_path / "prompts.txt").write_text("first\n\nthird\n")
    done = run_process(*argv, cwd=tmp_path)
    assert done.code == code
    assert text in (done.out if code == 0 else done.err)
    assert not HEAVY & done.imported
    assert done.cpu_seconds < 1.0


def test_env_prints_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    for name in ("python", "mmalign", "torch", "diffusers", "platform"):
        assert any(line.split()[0] == name for line in out.splitlines())


def test_every_command_names_an_existing_config() -> None:
    for words, command in cli.COMMANDS.items():
        assert hasattr(config, command.config), words
        assert command.target.startswith("mmalign.pipelines.")


@pytest.mark.parametrize("words", cli.COMMANDS, ids=" ".join)
def test_help_of_every_command(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*words, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: mmalign {' '.join(words)}")
    assert "--config" in out


def test_help_explains_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "diffusion-dpo", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "peak learning rate" in out  # inherited from TrainConfig's docstring
    assert "rank r of the update" in out  # of a section
    assert "--curriculum.num_buckets" in out  # of an optional section
    assert "--evaluation.rewards.weight" in out  # of a list


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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "pairs.path: is required"),
        (["--pairs.path", "absent"], "pairs.path: no such file or folder: absent"),
        ([*PAIRS, "--evaluation.prompts", "absent.txt"], "evaluation.prompts: no such file"),
        ([*PAIRS, "--model", "./absent"], "model: no such file or folder: ./absent"),
        ([*PAIRS, "--max_steps", "0"], "max_steps: must be at least 1, got 0"),
        ([*PAIRS, "--learning_rate", "-1"], "learning_rate: must be at least 0, got -1"),
        ([*PAIRS, "--beta", "-1"], "beta: must be at least 0, got -1"),
        ([*PAIRS, "--beta", ".nan"], "beta: must be a finite number"),
        ([*PAIRS, "--caption_dropout", "1.5"], "caption_dropout: must be between 0 and 1"),
        ([*PAIRS, "--lora.rank", "0"], "lora.rank: must be at least 1"),
        ([*PAIRS, "--evaluation.rewards", "[{batch_size: 0}]"], "evaluation.rewards[0].batch_size"),
        ([*PAIRS, "--output_dir", "file/run"], "output_dir: "),
        ([*PAIRS, "--resume_from_checkpoint", "absent"], "resume_from_checkpoint: no such folder"),
        ([*PAIRS, "--output_dir", "used"], "output_dir: used/checkpoints holds checkpoints"),
    ],
)
def test_wrong_values(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: Callable[..., str],
    flags: list[str],
    message: str,
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "used/checkpoints/checkpoint-5").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    flags = flags if "--model" in flags else ["--model", "./model", *flags]
    assert fails("train", "diffusion-dpo", *flags).startswith(message)


def test_shard_must_exist(tmp_path: Path, fails: Callable[..., str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n")
    flags = ["--prompts", str(prompts), "--model", str(tmp_path), "--num_shards", "2"]
    assert fails("pairs", "build", *flags, "--shard", "2").startswith("shard: 2 must be below")


def test_output_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    def refuse(dir: Path) -> None:  # root may write anywhere
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    flags = ["--model", str(tmp_path), "--output", str(tmp_path / "new" / "images")]
    assert fails("generate", *flags) == (
        f"output: {tmp_path} is not writable (Read-only file system),"
        f" so {tmp_path}/new/images cannot be created"
    )


def test_output_folder_that_is_a_file(tmp_path: Path, fails: Callable[..., str]) -> None:
    (file := tmp_path / "images").touch()
    flags = ["--model", str(tmp_path), "--output", str(file)]
    assert fails("generate", *flags) == f"output: {file} is a file, so {file} cannot be created"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "mmalign: no command 'trian'; the nearest is 'train'"),
        (["train", "difusion-dpo"], "mmalign train: no command 'difusion-dpo'; the nearest is 'd"),
        (["train"], "mmalign train: say which: diffusion-dpo, "),
        (["--seed", "1"], "no command '--seed'"),
    ],
)
def test_wrong_command(fails: Callable[..., str], argv: list[str], message: str) -> None:
    assert fails(*argv).startswith(message)


def test_group_help_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pairs", "--help"]) == 0
    out = capsys.readouterr().out
    assert "pairs build" in out
    assert "train" not in out


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(options: Any) -> None:
        raise error

    loader = types.SimpleNamespace(import_module=lambda name: types.SimpleNamespace(run=run))
    monkeypatch.setattr(cli, "importlib", loader)


def test_input_error_of_a_pipeline_is_one_clean_line(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    raising(monkeypatch, InputError("row 3:\nbad \x1b[31mname\x1b[0m"))
    assert fails("env") == "row 3: bad  [31mname [0m"


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, KeyboardInterrupt())
    assert cli.main(["env"]) == 130


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_memory_that_ends_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, error)
    assert cli.main(["env"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: out of memory; lower")
    assert line.count("\n") == 1


def test_other_exceptions_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["env"])


def test_exit_code_of_a_stopped_run_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, SystemExit(143))
    with pytest.raises(SystemExit) as caught:
        cli.main(["env"])
    assert caught.value.code == 143
