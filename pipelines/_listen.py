"""Listening on an address, and what people are told about it."""

from __future__ import annotations

import socket
import sys

from mmalign.types import InputError

PROBE = ("192.0.2.1", 9)
"""An address for documentation only: asking the way to it tells this machine's own address."""


def listen(host: str, port: int) -> socket.socket:
    """Listen on an address.

    Raises:
        InputError: if it is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise InputError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; "
            "choose another --host or --port"
        ) from error


def shown_address(host: str, port: int) -> str:
    """Write the address as others reach it, without a slash at its end."""
    shown = _own_address() if host in ("0.0.0.0", "::") else host
    shown = f"[{shown}]" if ":" in shown else shown
    return f"http://{shown}:{port}"


def say(line: str) -> None:
    """Print at once, also into a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _own_address() -> str:
    """Find the address under which others reach this machine; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(PROBE)
        except OSError:
            return socket.gethostname()
        return str(probe.getsockname()[0])
