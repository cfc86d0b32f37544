"""The command line as a whole: start-up, help, exit codes, and errors of one line."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign import cli, config
from mmalign.types import InputError


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
