"""Diffusion-DPO in rounds: the policy makes new pairs, a reward ranks them, training goes on.

This is online feedback (Guo et al. 2024, arXiv 2402.04792) for image generators: pairs stay close
to what the policy makes now, which pairs of its base cease to be. One LoRA is trained through all
rounds against the base as reference. Every round but the last is a run folder of its own,
`round-1`, `round-2`, ...; the last one's results are in `output_dir` itself.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from mmalign.accelerator import make_accelerator
from mmalign.checkpoint import latest_checkpoint, load_checkpoint
from mmalign.config import (
    CandidatesConfig,
    EvalConfig,
    ModelConfig,
    OnlineDpoConfig,
    PairsBuildConfig,
    changed_options,
    dump_config,
)
from mmalign.lora import WEIGHTS_NAME
from mmalign.pipelines import diffusion_dpo
from mmalign.pipelines._evaluation import check_judge
from mmalign.pipelines._reported import with_watched
from mmalign.pipelines._training import MAY_CHANGE
from mmalign.pipelines.pairs_build import build_pairs
from mmalign.processes import from_main, is_main, launched, rank, together, world_size
from mmalign.randomness import derive_seed
from mmalign.training_state import check_length, check_same_run
from mmalign.types import InputError

logger = logging.getLogger(__name__)


def run(config: OnlineDpoConfig) -> None:
    """Run the rounds; those that an interrupted run has finished are not done again.

    Raises:
        InputError: options or input are unusable.
    """
    started = time.monotonic()
    check_judge(config.candidates.rewards, config.evaluation)
    watched = with_watched(config.evaluation, config.candidates.rewards)
    config = replace(config, evaluation=watched)
    if not config.lora.enabled:
        raise InputError("lora.enabled: rounds pass a LoRA on, so full fine-tuning has none")
    if config.adapter is not None:
        raise InputError("adapter: rounds go on from a LoRA by lora.init_from")
    if config.resume_from_checkpoint not in (None, "latest"):
        raise InputError("resume_from_checkpoint: rounds go on with `latest` only")
    if launched()[1] > 1:  # sharing the candidates needs to know how many processes there are
        make_accelerator(config, cpu=config.device == "cpu")
    if config.resume_from_checkpoint is None and from_main(lambda: _folder(config, 1).exists()):
        raise InputError(
            f"output_dir: {config.output_dir} holds an earlier run; continue it with"
            " --resume_from_checkpoint latest, or choose another --output_dir"
        )
    finished = from_main(lambda: _finished(config))
    for number in range(1, config.rounds + 1):
        if number not in finished:
            if is_main():
                tqdm.write(f"round {number} of {config.rounds}")
            _round(config, number, started)


def _finished(config: OnlineDpoConfig) -> list[int]:
    """List the rounds before the last that are finished, after checking that they are this run's.

    Raises:
        InputError: they are of another run, by the rules of a run that is resumed.
    """
    numbers = [n for n in range(1, config.rounds) if (_adapter(config, n) / WEIGHTS_NAME).exists()]
    for number in numbers:
        _check_finished(_round_config(config, number), number)
    return numbers


def _check_finished(config: OnlineDpoConfig, number: int) -> None:
    """Refuse a finished round that this run cannot go on from; say what else was different."""
    folder = Path(config.output_dir)
    path = latest_checkpoint(folder / "checkpoints")
    if path is not None:
        checkpoint = load_checkpoint(path)
        check_same_run(checkpoint, config)
        check_length(path, checkpoint, config)
    file = folder / "config.yaml"
    if not file.exists():
        return
    # A finished round keeps its length, and a moved folder is no other option.
    harmless = {*MAY_CHANGE, "rounds"} - {"max_steps"}
    places = {"pairs.path", *(["lora.init_from"] if number > 1 else [])}
    changes = [
        change
        for change in changed_options(file.read_text(encoding="utf-8"), dump_config(config))
        if (name := change.partition(":")[0]) not in places
        and name.partition(".")[0] not in harmless
    ]
    if changes:
        logger.warning("%s is kept and had other options: %s", folder, "; ".join(changes))


def _folder(config: OnlineDpoConfig, number: int) -> Path:
    output = Path(config.output_dir)
    return output if number == config.rounds else output / f"round-{number}"


def _adapter(config: OnlineDpoConfig, number: int) -> Path:
    return _folder(config, number) / "adapter"


def _round(config: OnlineDpoConfig, number: int, started: float) -> None:
    """Make pairs with the policy so far and train on them."""
    own = _round_config(config, number)
    build = _build_config(own, number)
    together(lambda: build_pairs(build))
    diffusion_dpo.run(own, method="online-dpo", started=started)


def _round_config(config: OnlineDpoConfig, number: int) -> OnlineDpoConfig:
    """Give the options of a round, which goes on from the LoRA of the one before."""
    folder = _folder(config, number)
    before = config.lora.init_from if number == 1 else str(_adapter(config, number - 1))
    return replace(
        config,
        output_dir=str(folder),
        pairs=replace(config.pairs, path=str(folder / "pairs"), cache_dir=None),
        lora=replace(config.lora, init_from=before),
        evaluation=config.evaluation if number == config.rounds else EvalConfig(),
        resume_from_checkpoint="latest",
    )


def _build_config(config: OnlineDpoConfig, number: int) -> PairsBuildConfig:
    """Every round draws other candidates."""
    model = {name: getattr(config, name) for name in ModelConfig.__dataclass_fields__}
    how = {name: getattr(config.candidates, name) for name in CandidatesConfig.__dataclass_fields__}
    sampling = config.candidates.sampling
    how["sampling"] = replace(sampling, seed=derive_seed(sampling.seed, "round", number))
    place = {"adapter": config.lora.init_from, "output": config.pairs.path}
    shard = {"shard": rank(), "num_shards": world_size()}
    return PairsBuildConfig(**{**model, **how, **place, **shard})
