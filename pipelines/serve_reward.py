"""`mmalign serve-reward`: a reward for other machines, by the protocol of `http`."""

from __future__ import annotations

import secrets
import signal
from contextlib import suppress
from typing import TYPE_CHECKING

from mmalign.config import RewardConfig
from mmalign.pipelines._evaluation import resolve_device
from mmalign.pipelines._label_app import is_loopback
from mmalign.pipelines._listen import listen, say, shown_address
from mmalign.rewards import load_reward
from mmalign.types import InputError

if TYPE_CHECKING:
    from mmalign.config import ServeRewardConfig
    from mmalign.types import Reward

GRACE = 30
"""Seconds that requests which are being answered may still take when the server is told to end."""


def run(config: ServeRewardConfig) -> None:
    """Serve until interrupted or terminated; what is being answered then is still answered.

    Raises:
        InputError: if the reward cannot be loaded, or the address is taken.
    """
    if not config.reward:
        raise InputError("reward: name one, such as: mmalign serve-reward clip")
    if config.token == "":
        raise InputError("token: must not be empty")
    device = resolve_device(config.device)
    named = RewardConfig(name=config.reward, options=config.options, batch_size=config.batch_size)
    reward = load_reward(named, device, None)
    local = is_loopback(config.host)
    token = config.token if config.token or local else secrets.token_urlsafe(16)
    _serve(config, reward, device, token)


def _serve(config: ServeRewardConfig, reward: Reward, device: str, token: str | None) -> None:
    from mmalign.pipelines._reward_app import make_app
    from mmalign.pipelines._serving import Server

    app = make_app(reward, config, token=token, local_only=is_loopback(config.host), device=device)
    with listen(config.host, config.port) as listener:
        address = f"{shown_address(config.host, listener.getsockname()[1])}/"
        say(f"{reward.name} ({reward.modality}, on {device}) at {address}  (Ctrl+C ends)")
        if token is not None and config.token is None:
            say(f"token: {token}  (put it into a variable there, and name that as token_env)")
        # uvicorn raises a signal again when it has ended, which then is the normal end.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            Server(app, grace=GRACE, lifespan="on").run(sockets=[listener])
    say("ended")
