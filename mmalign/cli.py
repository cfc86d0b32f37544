"""The `mmalign` command.

A command is a configuration dataclass and a pipeline's `run`. The pipeline, and with it torch, is
imported only after the options have been read and checked.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mmalign.launch import LAUNCH_HELP, relaunch, take_launch_options
from mmalign.processes import (
    GRACE_SECONDS,
    launched,
    leave,
    lost_contact,
    report,
    stop_with_launcher,
)
from mmalign.types import InputError

Words = tuple[str, ...]


class Command(NamedTuple):
    """What a command runs: a class of `mmalign.config`, and `module:function` of a pipeline.

    The option `positional` may be given as a bare argument right after the command, or as several
    if it is a list.
    """

    config: str
    target: str
    summary: str
    positional: str | None = None


OUT_OF_MEMORY = (
    "out of memory; lower the batch size or the resolution; a training run goes on from its last"
    " checkpoint with --resume_from_checkpoint latest"
)
COMMANDS: dict[Words, Command] = {
    ("quickstart", "image"): Command(
        "QuickstartImageConfig",
        "mmalign.pipelines.quickstart_image:run",
        "align the embedded model end to end, on CPU, in minutes",
    ),
    ("quickstart", "vlm"): Command(
        "QuickstartVlmConfig",
        "mmalign.pipelines.quickstart_vlm:run",
        "make the embedded captioner hallucinate less, on CPU, in minutes",
    ),
    ("train", "diffusion-dpo"): Command(
        "DiffusionDpoConfig", "mmalign.pipelines.diffusion_dpo:run", "Diffusion-DPO on pairs"
    ),
    ("train", "consistency-dpo"): Command(
        "ConsistencyDpoConfig",
        "mmalign.pipelines.consistency_dpo:run",
        "Consistency DPO on a latent consistency model",
    ),
    ("train", "curriculum-dpo"): Command(
        "CurriculumDpoConfig",
        "mmalign.pipelines.curriculum_dpo:run",
        "Diffusion-DPO on pairs ordered from easy to hard",
    ),
    ("train", "mapo"): Command(
        "MapoConfig", "mmalign.pipelines.mapo:run", "MaPO: no reference model"
    ),
    ("train", "diffusion-kto"): Command(
        "DiffusionKtoConfig", "mmalign.pipelines.diffusion_kto:run", "Diffusion-KTO"
    ),
    ("train", "dro"): Command(
        "DroConfig", "mmalign.pipelines.dro:run", "DRO: good images fitted, bad ones un-fitted"
    ),
    ("train", "online-dpo"): Command(
        "OnlineDpoConfig",
        "mmalign.pipelines.online_dpo:run",
        "Diffusion-DPO in rounds, on the model's own new pairs",
    ),
    ("train", "d3po"): Command(
        "D3poConfig", "mmalign.pipelines.d3po:run", "D3PO on the model's own samples"
    ),
    ("train", "tailorpo"): Command(
        "TailorpoConfig",
        "mmalign.pipelines.tailorpo:run",
        "TailorPO: preferences between candidates of one sampler step",
    ),
    ("train", "draft"): Command(
        "DraftConfig", "mmalign.pipelines.draft:run", "DRaFT: gradient of a differentiable reward"
    ),
    ("train", "rocm"): Command(
        "RocmConfig", "mmalign.pipelines.rocm:run", "ROCM: the same for consistency models"
    ),
    ("train", "vlm-dpo"): Command(
        "VlmDpoConfig",
        "mmalign.pipelines.vlm_dpo:run",
        "the DPO family on a vision-language model",
    ),
    ("compare",): Command(
        "CompareConfig",
        "mmalign.pipelines.compare:run",
        "methods at equal budgets over several seeds, in one table",
    ),
    ("pairs", "build"): Command(
        "PairsBuildConfig",
        "mmalign.pipelines.pairs_build:run",
        "candidates, scores, then preference pairs",
    ),
    ("pairs", "validate"): Command(
        "PairsCheckConfig",
        "mmalign.pipelines.pairs_validate:run",
        "list every bad row",
        positional="path",
    ),
    ("pairs", "stats"): Command(
        "PairsCheckConfig",
        "mmalign.pipelines.pairs_stats:run",
        "counts, ties, histogram of gaps",
        positional="path",
    ),
    ("pairs", "label"): Command(
        "PairsLabelConfig",
        "mmalign.pipelines.pairs_label:run",
        "let people choose between images, in the browser",
        positional="images",
    ),
    ("pairs", "topics"): Command(
        "TopicOverwriteConfig",
        "mmalign.pipelines.topic_overwrite:run",
        "make pairs of a vision-language model's own answers, topic by topic",
        positional="questions",
    ),
    ("shapes", "pictures"): Command(
        "ShapesPicturesConfig",
        "mmalign.pipelines.shapes_pictures:run",
        "draw pictures of Shapes world, with questions",
    ),
    ("score",): Command(
        "ScoreConfig", "mmalign.pipelines.score:run", "score images, or answers about images"
    ),
    ("serve-reward",): Command(
        "ServeRewardConfig",
        "mmalign.pipelines.serve_reward:run",
        "a reward for other machines, over HTTP",
        positional="reward",
    ),
    ("generate",): Command("GenerateConfig", "mmalign.pipelines.generate:run", "sample images"),
    ("evaluate", "image"): Command(
        "EvaluateImageConfig",
        "mmalign.pipelines.evaluate_image:run",
        "compare models and folders of images, with a report",
    ),
    ("evaluate", "chair"): Command(
        "EvaluateChairConfig",
        "mmalign.pipelines.evaluate_chair:run",
        "captions with objects that are not in the image",
    ),
    ("evaluate", "pope"): Command(
        "EvaluatePopeConfig",
        "mmalign.pipelines.evaluate_pope:run",
        "is there an X in the image? yes or no",
    ),
    ("evaluate", "amber"): Command(
        "EvaluateAmberConfig",
        "mmalign.pipelines.evaluate_amber:run",
        "objects of descriptions, and yes/no questions",
    ),
    ("evaluate", "objhal"): Command(
        "EvaluateObjhalConfig",
        "mmalign.pipelines.evaluate_objhal:run",
        "Object HalBench, by rule or language model",
    ),
    ("evaluate", "mmhal"): Command(
        "EvaluateMmhalConfig",
        "mmalign.pipelines.evaluate_mmhal:run",
        "MMHal-Bench, by rule or language model",
    ),
    ("gallery",): Command(
        "GalleryConfig",
        "mmalign.pipelines.gallery:run",
        "several runs on one page",
        positional="runs",
    ),
    ("export",): Command(
        "ExportConfig", "mmalign.pipelines.export:run", "adapter to kohya format or merged model"
    ),
    ("env",): Command("EnvConfig", "mmalign.pipelines.env:run", "versions, for bug reports"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: what follows `mmalign`; the process's own arguments when omitted.

    Returns:
        0, or 2 after wrong input (one line on stderr), or 130 after an interrupt. Anything else is
        a bug and leaves as the exception it is.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(_overview(()))
        return 0
    if arguments == ["--version"]:
        from importlib.metadata import version

        sys.stdout.write(f"mmalign {version('mmalign')}\n")
        return 0
    stop_with_launcher()
    main_process = launched()[0] == 0
    if not main_process:
        os.environ.setdefault("TQDM_DISABLE", "1")
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_BarHandler()])
    logging.getLogger().setLevel(logging.WARNING if main_process else logging.ERROR)
    logging.getLogger("mmalign").setLevel(logging.INFO if main_process else logging.ERROR)
    code = _guarded(arguments)
    if code and launched()[1] > 1:
        sys.stdout.flush()
        os._exit(code)  # an orderly end would wait for processes that are gone
    return code


def _guarded(arguments: list[str]) -> int:
    try:
        return _dispatch(arguments)
    except InputError as error:
        report(f"error: {_one_line(str(error))}\n")
        return 2
    except (RuntimeError, MemoryError) as error:
        if _is_out_of_memory(error):
            report(f"error: {OUT_OF_MEMORY} ({_one_line(str(error)[:80])})\n")
            return 1
        lost = lost_contact(error) if isinstance(error, RuntimeError) else None
        if lost is None:
            raise
        time.sleep(GRACE_SECONDS)
        report(f"error: {_one_line(lost)}\n")
        return 1
    except KeyboardInterrupt:
        report("interrupted\n")
        return 130


def _is_out_of_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from mmalign.scoring import is_out_of_memory

    return is_out_of_memory(error)


def _dispatch(arguments: list[str]) -> int:
    words = _command_words(arguments)
    if words not in COMMANDS:  # a group: its help was asked for, or its second word is missing
        if arguments[len(words) :]:
            sys.stdout.write(_overview(words))
            return 0
        following = ", ".join(key[1] for key in COMMANDS if key[0] == words[0])
        raise InputError(f"mmalign {words[0]}: say which: {following}")
    command = COMMANDS[words]
    launch, arguments = take_launch_options(words, arguments)
    if launch is not None:
        return relaunch(launch, arguments)
    from mmalign import config
    from mmalign.options import parse_options
    from mmalign.preflight import check_config

    flags, name = arguments[len(words) :], " ".join(words)
    if command.positional:
        name += f" [{command.positional.upper()}]"
        if flags and not flags[0].startswith("-"):
            flags = _named(command, flags)
    options = parse_options(getattr(config, command.config), flags, command=name)
    check_config(options)
    module, _, function = command.target.partition(":")
    run: Callable[[Any], object] = getattr(importlib.import_module(module), function)
    run(options)
    leave()
    return 0


def _named(command: Command, flags: list[str]) -> list[str]:
    """Put the option's name before bare arguments."""
    import typing

    from mmalign import config

    hint = typing.get_type_hints(getattr(config, command.config))[str(command.positional)]
    if hint == list[str]:
        return [f"--{command.positional}", *flags]
    return [f"--{command.positional}={flags[0]}", *flags[1:]]


def _command_words(arguments: list[str]) -> Words:
    """Take the leading words that name a command or a group of commands.

    Raises:
        InputError: there is no such command.
    """
    words: Words = ()
    while words not in COMMANDS:
        rest = arguments[len(words) :]
        if not rest or rest[0].startswith("-"):
            break
        word = rest[0]
        valid = list(dict.fromkeys(k[len(words)] for k in COMMANDS if k[: len(words)] == words))
        if word not in valid:
            nearest = difflib.get_close_matches(word, valid, n=1, cutoff=0.0)[0]
            group = " ".join(("mmalign", *words))
            raise InputError(f"{group}: no command {word!r}; the nearest is {nearest!r}")
        words = (*words, word)
    if not words:
        raise InputError(f"no command {arguments[0]!r}; see mmalign --help")
    return words


def _overview(group: Words) -> str:
    lines = [
        f"usage: {' '.join(('mmalign', *group))} COMMAND [--config FILE|NAME] [--option VALUE ...]",
        "",
    ]
    for words, command in COMMANDS.items():
        if words[: len(group)] == group:
            lines.append(f"  {' '.join(words):24}{command.summary}")
    lines += ["", "mmalign COMMAND --help lists a command's options.", ""]
    if not group:
        lines[-1:] = [LAUNCH_HELP, ""]
    return "\n".join(lines)


def _one_line(message: str) -> str:
    """Keep text from files and models from breaking the line or steering the terminal."""
    return "".join(c if c.isprintable() else " " for c in message).strip()


class _BarHandler(logging.Handler):
    """Writes log lines above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        tqdm.write(prefix + _one_line(self.format(record)), file=sys.stderr)
