"""Weights that DeepSpeed divides, on a small network; the runs are in `test_two_processes*.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from two_processes import in_two

from mmalign import sharding, zero
from mmalign.config import is_installed
from mmalign.types import InputError

WIDTH = 6


class Block(nn.Module):
    """A frozen layer, and a trained one beside it as in a LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.trained = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        both: Tensor = self.frozen(x) + self.trained(x)
        return both.tanh()


def blocks() -> list[Block]:
    torch.manual_seed(0)
    return [Block() for _ in range(3)]


def gradients(
    net: list[Block], *, recompute: bool = False, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Run the network twice, once more without gradients, and then backward."""
    x = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)

    def run(x: Tensor) -> Tensor:
        for block in net:
            if recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, **sharding.checkpointing())
            else:
                x = block(x)
        return x.square().sum()

    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = run(x) + run(2 * x)
        with torch.no_grad():
            factor = run(x)
    (loss * factor).backward()
    return [p.grad for block in net for p in block.trained.parameters() if p.grad is not None]


@pytest.mark.skipif(not is_installed("deepspeed"), reason="deepspeed is not installed")
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"dtype": torch.bfloat16}], ids=repr)
def test_layers_are_whole_only_while_they_run(options: dict[str, Any], tmp_path: Path) -> None:
    expected = gradients(blocks(), dtype=options.get("dtype", torch.float32))

    def divided() -> None:
        torch.distributed.init_process_group("gloo")
        os.environ[zero.REQUEST] = "true"
        net = blocks()
        zero.divide(net, torch.device("cpu"))
        weights = [p for block in net for p in block.frozen.parameters()]
        assert all(zero.is_divided(p) and p.numel() == 0 for p in weights)
        whole: list[int] = []

        def count(*_: object) -> None:
            whole.append(sum(p.numel() > 0 for p in weights))

        for block in net:
            block.trained.register_forward_hook(count)
            block.trained.weight.register_hook(count)
        found = gradients(net, **options)
        for a, b in zip(found, expected, strict=True):
            # DeepSpeed adds the bias by itself, which bfloat16 rounds once more.
            rough = {"rtol": 0.01, "atol": 0.01} if "dtype" in options else {}
            torch.testing.assert_close(a, b, **rough)
        assert len(whole) >= 12  # 9 forwards, 6 backwards
        assert max(whole) == 0, whole
        assert all(p.numel() == 0 for p in weights)
        (tmp_path / os.environ["RANK"]).write_text(json.dumps(len(found)))

    ended = in_two(divided, tmp_path / "logs")
    assert ended.codes == [0, 0], "\n".join(text[-2000:] for text in ended.output)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["6", "6"]


def test_nothing_frozen_is_refused() -> None:
    with pytest.raises(InputError, match="divides frozen weights; train a LoRA, or use fsdp2"):
        zero.divide([nn.Linear(2, 2)], torch.device("cpu"))


def test_what_the_configuration_may_not_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmalign.zero.is_installed", lambda name: False)
    with pytest.raises(InputError, match=r"not installed; pip install 'mmalign\[deepspeed\]'"):
        zero.check()
    monkeypatch.setattr("mmalign.zero.is_installed", lambda name: True)
    zero.check()
    monkeypatch.setenv(zero.STAGE, "2")
    with pytest.raises(InputError, match="zero_stage must be 3"):
        zero.check()
    monkeypatch.setenv(zero.STAGE, "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu")
    with pytest.raises(InputError, match="offload_param_device must be none"):
        zero.check()


RUN = """
import sys
from mmalign.cli import main
print(main(sys.argv[1:]), "deepspeed" in sys.modules)
"""


@pytest.mark.skipif(not is_installed("deepspeed"), reason="deepspeed is not installed")
def test_a_run_that_does_not_ask_for_it_does_not_import_it(tmp_path: Path) -> None:
    """It takes seconds, and says on standard output that it found no GPU."""
    options = "--max_steps 1 --evaluation.num_prompts 1 --evaluation.images_per_prompt 1"
    command = f"train draft --config shapes_draft --per_device_train_batch_size 1 {options}"
    done = subprocess.run(
        [sys.executable, "-c", RUN, *command.split(), "--output_dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "0 False", done.stdout
