"""Rewards by a program: what it is sent, and what becomes of it and of what it started."""

from __future__ import annotations

import base64
import json
import os
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scorers import COUNT, IMAGES, PREAMBLE, PROMPTS, command

from mmalign.config import RewardConfig
from mmalign.rewards import load_reward
from mmalign.scoring import score_samples
from mmalign.types import InputError


def test_command_sends_what_the_protocol_says_in_batches(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = PREAMBLE + f"    open({str(log)!r}, 'a').write(line)\n" + COUNT
    scores = score_samples(command(program, batch_size=2), IMAGES, PROMPTS)
    assert scores.tolist() == [len(prompt) for prompt in PROMPTS]
    requests = [json.loads(line) for line in log.read_text().splitlines()]
    assert [request["prompts"] for request in requests] == [PROMPTS[:2], PROMPTS[2:]]
    picture = Image.open(BytesIO(base64.b64decode(requests[1]["images"][0])))
    assert (picture.format, picture.size) == ("PNG", (7, 5))
    assert np.array_equal(
        np.asarray(picture), (IMAGES[2] * 255).round().permute(1, 2, 0).to(torch.uint8)
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("python3 scorer.py", "must be a list"),
        ([], "must be a list"),
        (["no-such-program"], "cannot start no-such-program: No such file"),
    ],
)
def test_command_options_are_checked(argv: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_reward(RewardConfig(name="command", options={"command": argv}))


def test_program_that_died_is_started_again(tmp_path: Path) -> None:
    mark = str(tmp_path / "started before")
    once = f"    if not os.path.exists({mark!r}): open({mark!r}, 'w'); sys.exit(3)\n"
    assert len(score_samples(command(PREAMBLE + once + COUNT), IMAGES, PROMPTS)) == 3


def test_program_that_dies_again_shows_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "starts"
    program = f"open({str(log)!r}, 'a').write('x')\n" + PREAMBLE + "    1 / 0\n"
    with pytest.raises(InputError, match=r"ended with code 1: ZeroDivisionError: [^\n]*$") as error:
        score_samples(command(program), IMAGES, PROMPTS)
    assert "\n" not in str(error.value)
    assert log.read_text() == "xx"


def test_program_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    program = PREAMBLE + (
        "    import subprocess\n"
        "    child = subprocess.Popen(['sleep', '60'])\n"
        f"    open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "    print('thinking', file=sys.stderr, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with pytest.raises(InputError, match=r"no answer within 2 s: thinking$"):
        score_samples(command(program, timeout=2), IMAGES, PROMPTS)
    child = int((tmp_path / "child").read_text())
    for _ in range(200):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{child}/stat").exists():
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "Z":
                return
        time.sleep(0.01)
    pytest.fail("the program's child is still there")


def test_stray_output_is_not_taken_for_a_reply() -> None:
    program = PREAMBLE + COUNT + COUNT
    reward = command(program)
    assert len(score_samples(reward, IMAGES, PROMPTS)) == 3
    time.sleep(0.2)
    with pytest.raises(InputError, match="wrote a line that nobody asked for"):
        score_samples(reward, IMAGES, PROMPTS)


def test_full_pipes_block_neither_side() -> None:
    """A megabyte of complaints before each reply, and a request larger than a pipe."""
    program = PREAMBLE + "    sys.stderr.write('x' * 2**20 + '\\n')\n" + COUNT
    images = torch.rand(1, 3, 256, 256).expand(3, -1, -1, -1)
    assert len(score_samples(command(program), images, PROMPTS)) == 3


def test_program_leaves_with_its_reward() -> None:
    reward = command(PREAMBLE + COUNT)
    score_samples(reward, IMAGES, PROMPTS)
    process = reward._program._process
    del reward
    assert process.wait(10) == 0
