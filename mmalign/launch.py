"""Starting a command in several processes, through accelerate.

`mmalign COMMAND --accelerate_config ddp --num_processes 8` runs the command in 8 processes, as
`accelerate launch --config_file ddp.yaml --num_processes 8 -m mmalign COMMAND` does, but passes
signals on, waits for the processes to save themselves, and ends with the exit code of the one that
failed first, without a traceback of the launcher's own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmalign.config import NO_DEEPSPEED, as_path
from mmalign.types import InputError

CONFIGS = "pkg://mmalign.configs/accelerate"
PASSED_ON = (
    "num_processes",
    "num_machines",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "gpu_ids",
)
"""Options of `accelerate launch` that mmalign passes on."""
LAUNCH_HELP = (
    "train, score and pairs build take --accelerate_config ddp|fsdp2|\n"
    "deepspeed_zero3|FILE and --num_processes N, and run in N processes."
)
SAVING_SECONDS = 120
"""How long processes have to save themselves after SIGTERM."""


def take_launch_options(
    words: Sequence[str], arguments: Sequence[str]
) -> tuple[dict[str, str] | None, list[str]]:
    """Split the launcher's options from a command's.

    Args:
        words: the command.
        arguments: the command line, the command included.

    Returns:
        The launcher's options by name, None without any, and the other arguments.

    Raises:
        InputError: an option lacks its value, there is no `accelerate_config`, or the command runs
            in one process.
    """
    options: dict[str, str] = {}
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.removeprefix("--").partition("=")
        known = argument.startswith("--") and name in ("accelerate_config", *PASSED_ON)
        if not known:
            rest.append(argument)
            continue
        options[name] = value if equals else next(waiting, "")
        if not options[name]:
            raise InputError(f"{name}: its value is missing")
    if options and "accelerate_config" not in options:
        first = next(iter(options))
        raise InputError(f"{first}: needs --accelerate_config, such as ddp")
    if options and words[0] not in ("train", "score") and tuple(words) != ("pairs", "build"):
        raise InputError(f"accelerate_config: mmalign {' '.join(words)} runs in one process")
    return options or None, rest


def config_file(name: str) -> Path:
    """Find a configuration of accelerate: a file, or the name of a packaged one.

    Raises:
        InputError: there is none.
    """
    packaged = {path.stem: path for path in sorted(as_path(CONFIGS).glob("*.yaml"))}
    path = packaged.get(name, as_path(name))
    if not path.is_file():
        raise InputError(
            f"accelerate_config: no such file: {name}; packaged ones are {', '.join(packaged)}"
        )
    return path


def relaunch(options: Mapping[str, str], arguments: Sequence[str]) -> int:
    """Run a command in several processes.

    Args:
        options: as `take_launch_options` returns them.
        arguments: the command and its own options.

    Returns:
        0, or the exit code of the process that failed first (128 + n for signal n).

    Raises:
        InputError: an option is unusable.
    """
    flags = [f"--{name}={value}" for name, value in options.items() if name in PASSED_ON]
    file = config_file(options["accelerate_config"])
    if not options.get("num_processes", "1").isdigit():
        raise InputError(f"num_processes: not a number: {options['num_processes']}")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING_SECONDS))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Where no name server is in reach, torch warns of each connection that it has no name.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    parser = launch_command_parser()
    known = ["--config_file", str(file), "--main_process_port=0", *flags, "--module", "mmalign"]
    try:
        launch_command(parser.parse_args([*known, *arguments]))
    except ChildFailedError as error:
        code = int(error.get_first_failure()[1].exitcode)
        return code if code >= 0 else 128 - code
    except SignalException as error:
        return 128 + int(error.sigval)
    except ImportError as error:
        raise InputError(NO_DEEPSPEED) from error
    except ValueError as error:
        raise InputError(f"accelerate_config: {str(error).splitlines()[0]}") from error
    return 0
