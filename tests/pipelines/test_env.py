"""What a bug report says about the machine, and what it keeps to itself."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmalign import cli
from mmalign.pipelines import env


def described(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    assert cli.main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert all(isinstance(value, str) and "\n" not in value for value in facts.values())
    return facts  # type: ignore[no-any-return]


def test_secrets_are_masked_and_other_settings_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("OPENAI_API_KEY", "hunter2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1\nx")
    facts = described(capsys)
    assert "hunter2" not in json.dumps(facts)
    assert {facts[f"${name}"] for name in ("HF_TOKEN", "WANDB_API_KEY", "HTTPS_PROXY")} == {"(set)"}
    assert facts["$CUDA_VISIBLE_DEVICES"] == r"0,1\nx"
    assert "$OPENAI_API_KEY" not in facts


def test_devices_have_memory_and_driver(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(name="Card", total_memory=24 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    smi = {"nvidia-smi": "600.1\n600.1\n"}
    monkeypatch.setattr(env, "_output", lambda *command: smi.get(command[0], ""))
    facts = described(capsys)
    assert facts["cuda:0"] == "Card, 24.0 GiB, compute 9.0"
    assert facts["driver"] == "600.1"


def test_accelerate_config_is_shown_without_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "default_config.yaml"
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(file))
    assert env._accelerate_config() == "none"
    file.write_text("mixed_precision: bf16\nmain_process_ip: 10.0.0.1\nnum_processes: 2\n")
    assert json.loads(env._accelerate_config()) == {"mixed_precision": "bf16", "num_processes": 2}
    file.write_text("a: [")
    assert env._accelerate_config() == "cannot be read (ParserError)"


@pytest.mark.parametrize(
    ("source", "origin"),
    [
        (
            '{"url": "x", "vcs_info": {"vcs": "git", "commit_id": "0123456789abcdef"}}',
            "git, commit ",
        ),
        ('{"url": "x", "dir_info": {"editable": true}}', "an editable checkout"),
        ('{"url": "x", "dir_info": {}}', "a wheel"),
        (None, "a wheel"),
    ],
)
def test_origin_says_how_it_was_installed(
    monkeypatch: pytest.MonkeyPatch, source: str | None, origin: str
) -> None:
    fake = SimpleNamespace(read_text=lambda name: source)
    monkeypatch.setattr(env, "distribution", lambda name: fake)
    assert env._origin().startswith(origin)
