"""What goes wrong while an online method trains is one clear line, and nothing is lost."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmalign import endpoint
from mmalign.checkpoint import latest_checkpoint, load_checkpoint
from mmalign.cli import main

calls = 0
"""How often the reward below has been called."""


def shout(bright: torch.Tensor) -> Any:
    raise RuntimeError("out of film\nand more")


def be_late(bright: torch.Tensor) -> Any:
    raise TimeoutError("no picture within 3 s")


FAULTS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "raises": (shout, r"failed for step 2 prompt \d: RuntimeError: out of film;"),
    "time-out": (be_late, r"failed for step 2 prompt \d: TimeoutError: no picture within 3 s;"),
    "nan": (lambda bright: bright * float("nan"), r"returned nan for step 2 prompt \d;"),
    "none": (lambda bright: None, r"returned None for step 2 prompt \d to step 2 prompt \d;"),
    "a none": (lambda bright: [None, *bright[1:]], r"returned None for step 2 prompt \d;"),
    "short": (lambda bright: bright[1:], r"returned \d+ instead of \d+ scores for step 2"),
    "text": (lambda bright: ["good"] * len(bright), r"returned 'good' for step 2 prompt \d;"),
}


def brightness_until(images: torch.Tensor, prompts: list[str], fault: str, after: int) -> Any:
    """Score by brightness, and from call number `after` on by a fault."""
    global calls
    calls += 1
    bright = images.mean((1, 2, 3))
    return bright if calls <= after else FAULTS[fault][0](bright)


def same(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return torch.ones(len(images))


def detached(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images.detach().mean((1, 2, 3))


def nan_gradient(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """A finite score whose gradient is not."""
    return (images * 0).mean((1, 2, 3)).sqrt()


@pytest.fixture
def run(
    tmp_path: Path, tiny_sd: Path, tiny_lcm: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run `mmalign train`; returns its error line, or nothing after success."""
    (tmp_path / "prompts.txt").write_text("red\na red\n")

    def start(method: str, reward: dict[str, Any], **more: Any) -> str:
        global calls
        calls = 0
        options: dict[str, Any] = {
            "model": str(tiny_lcm if method == "rocm" else tiny_sd),
            "output_dir": str(tmp_path / "run"),
            "device": "cpu",
            "offline": True,
            "prompts": str(tmp_path / "prompts.txt"),
            "rewards": [reward],
            "lora": {"rank": 2},
            "sampling": {"num_inference_steps": 2, "guidance_scale": 1.0},
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "resume_from_checkpoint": "latest",
            **more,
        }
        file = tmp_path / "config.json"  # JSON is YAML
        file.write_text(json.dumps(options))
        code = main(["train", method, "--config", str(file)])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert (code, len(lines)) in ((0, 0), (2, 1))
        return lines[0] if lines else ""

    return start


def mine(function: Any, **options: Any) -> dict[str, Any]:
    return {"name": f"{__name__}:{function.__name__}", "options": options}


def differentiable(function: Any) -> dict[str, Any]:
    path = f"{__name__}:{function.__name__}"
    return {"name": "callable", "options": {"function": path, "differentiable": True}}


def steps(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("fault", FAULTS)
def test_reward_that_fails_on_the_way(fault: str, run: Any, tmp_path: Path) -> None:
    error = run("d3po", mine(brightness_until, fault=fault, after=1))
    message = FAULTS[fault][1]
    assert re.match(rf"error: reward \S*brightness_until {message}", error), error
    assert error.endswith(f"last good weights: {tmp_path}/run/checkpoints/checkpoint-1")
    assert [line["step"] for line in steps(tmp_path / "run")] == [1]


@pytest.mark.parametrize("method", ["d3po", "tailorpo"])
def test_run_continues_once_the_reward_works_again(method: str, run: Any, tmp_path: Path) -> None:
    assert run(method, mine(brightness_until, fault="raises", after=1 if method == "d3po" else 3))
    for folder in ("run", "whole"):
        output = str(tmp_path / folder)
        good = mine(brightness_until, fault="raises", after=99)
        assert run(method, good, output_dir=output) == ""
    first, second = (tmp_path / folder for folder in ("run", "whole"))
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
    adapters = [load_file(f / "adapter/pytorch_lora_weights.safetensors") for f in (first, second)]
    assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[1])


@pytest.mark.parametrize("method", ["draft", "rocm"])
def test_reward_that_only_says_it_is_differentiable(method: str, run: Any) -> None:
    assert "reward detached says that it is differentiable" in run(method, differentiable(detached))


@pytest.mark.parametrize("method", ["draft", "rocm"])
def test_gradient_that_is_not_a_number(method: str, run: Any) -> None:
    assert "step 1: loss nan" in run(method, differentiable(nan_gradient))


@pytest.mark.parametrize("method", ["d3po", "tailorpo"])
def test_run_in_which_every_step_is_tied_ends(method: str, run: Any, tmp_path: Path) -> None:
    error = run(method, mine(same))
    assert "step 3: 3 steps in a row taught nothing: every candidate has the same rew" in error
    lines = steps(tmp_path / "run")
    assert [(line["ties"], line["skipped"]) for line in lines] == [(1, 1)] * 3
    path = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert path is not None
    trained = load_checkpoint(path).tensors["model"]
    assert all(value.abs().max() == 0 for name, value in trained.items() if "lora_B" in name)
    assert not (tmp_path / "run" / "adapter").exists()


def tied_at_first(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    global calls
    calls += 1
    return torch.ones(len(images)) if calls == 1 else images.mean((1, 2, 3))


def test_a_tied_step_is_skipped_and_counted(run: Any, tmp_path: Path) -> None:
    assert run("d3po", mine(tied_at_first)) == ""
    assert [line.get("skipped") for line in steps(tmp_path / "run")] == [1, None, None]
    report = (tmp_path / "run" / "report.html").read_text()
    assert "1 of the first 1 steps skipped: every candidate has the same reward" in report


def test_sampler_without_any_noise(run: Any, tiny_lcm: Path) -> None:
    one = {"num_inference_steps": 1, "guidance_scale": 1.0}
    assert "eta: a deterministic" in run("d3po", {"name": "brightness"}, eta=0.0)
    error = run("d3po", {"name": "brightness"}, model=str(tiny_lcm), sampling=one)
    assert "sampling.num_inference_steps: the only step draws no noise" in error


@pytest.mark.parametrize(
    ("method", "name", "options"),
    [("draft", "http", {"url": "http://127.0.0.1/"}), ("rocm", "command", {"command": ["cat"]})],
)
def test_external_reward_has_no_gradient(
    method: str, name: str, options: dict[str, Any], run: Any
) -> None:
    error = run(method, {"name": name, "options": options})
    assert f"{method} needs differentiable rewards, and {name} is not" in error


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("pass", "its reply is not a JSON object"),
        ("sys.exit(3)", "ended with code 3: giving up"),
        ("time.sleep(60)", "gives no answer within 2 s: giving up"),
    ],
)
def test_program_that_fails_on_the_way(fault: str, message: str, run: Any, tmp_path: Path) -> None:
    program = (
        "import json, os, sys, time\n"
        "for line in sys.stdin:\n"
        "    if os.path.exists('mark'):\n"
        "        print('giving up', file=sys.stderr, flush=True)\n"
        f"        {fault}\n"
        "        print(7, flush=True)\n"
        "    open('mark', 'w')\n"
        "    n = len(json.loads(line)['images'])\n"
        "    print(json.dumps({'rewards': list(range(n))}), flush=True)\n"
    ).replace("'mark'", repr(str(tmp_path / "mark")))
    argv = [sys.executable, "-S", "-c", program]
    error = run("d3po", {"name": "command", "options": {"command": argv, "timeout": 2}})
    assert error.startswith("error: reward command: ")
    assert message in error
    assert error.endswith("checkpoint-1")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("garbage", "its reply is something else, not JSON: '{\"rewards\"'"),
        ("slow", "gives no answer within 0.5 s (2 attempts)"),
        ("down", "(2 attempts)"),
    ],
)
def test_server_that_fails_on_the_way(
    fault: str, message: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.0)

    class Scorer(BaseHTTPRequestHandler):
        answered = False

        def do_POST(self) -> None:
            count = len(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["images"])
            if Scorer.answered and fault == "down":
                return
            if Scorer.answered and fault == "slow":
                time.sleep(0.7)
            reply = json.dumps({"rewards": list(range(count))}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(reply[:10] if Scorer.answered else reply)
            Scorer.answered = True

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Scorer)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    try:
        options = {"url": url, "timeout": 0.5, "retries": 1}
        error = run("d3po", {"name": "http", "options": options})
    finally:
        server.shutdown()
        server.server_close()
    assert error.startswith("error: reward http: ")
    assert message in error
    assert error.endswith("checkpoint-1")
