"""Programs and servers that score, and the rewards that ask them."""

from __future__ import annotations

import base64
import json
import sys
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmalign.config import RewardConfig
from mmalign.rewards import load_reward

IMAGES = torch.rand(3, 3, 5, 7, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a red", 'quote " and é', "line\nbreak"]

PREAMBLE = "import json, os, sys, time\nfor line in sys.stdin:\n    request = json.loads(line)\n"
COUNT = "    print(json.dumps({'rewards': [len(p) for p in request['prompts']]}), flush=True)\n"


def command(program: str, **options: Any) -> Any:
    """Make a reward of a program in Python."""
    argv = [sys.executable, "-S", "-c", program]
    return load_reward(RewardConfig(name="command", options={"command": argv, **options}))


def count_pixels(request: dict[str, Any]) -> tuple[int, bytes]:
    """Score by the mean gray of each picture, as it arrives."""
    pictures = [Image.open(BytesIO(base64.b64decode(text))) for text in request["images"]]
    return 200, json.dumps({"rewards": [float(np.mean(p)) for p in pictures]}).encode()


def over_http(url: str, **options: Any) -> Any:
    """Make a reward of a server."""
    return load_reward(RewardConfig(name="http", options={"url": url, **options}))
