"""Diffusion-DPO in rounds: the policy makes new pairs, a reward ranks them, training goes on.

This is online feedback (Guo et al. 2024, arXiv 2402.04792) for image generators: pairs stay close
to what the policy makes now, which pairs of its base cease to be. One LoRA is trained through all
rounds against the base as reference. Every round but the last is a run folder of its own,
`round-1`, `round-2`, ...; the last one's results are in `output_dir` itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from mmalign.accelerator import make_accelerator
from mmalign.config import (
    CandidatesConfig,
    EvalConfig,
    ModelConfig,
    OnlineDpoConfig,
    PairsBuildConfig,
)
from mmalign.lora import WEIGHTS_NAME
from mmalign.pipelines import diffusion_dpo
from mmalign.pipelines._evaluation import check_judge
from mmalign.pipelines._reported import with_watched
from mmalign.pipelines.pairs_build import build_pairs
from mmalign.processes import from_main, is_main, launched, rank, together, world_size
from mmalign.randomness import derive_seed
from mmalign.types import InputError


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
    adapter = config.lora.init_from
    for number in range(1, config.rounds + 1):
        done = _folder(config, number) / "adapter"
        if number == config.rounds or not from_main(_exists(done / WEIGHTS_NAME)):
            if is_main():
                tqdm.write(f"round {number} of {config.rounds}")
            _round(config, number, adapter, started)
        adapter = str(done)


def _exists(file: Path) -> Callable[[], bool]:
    return lambda: file.exists()


def _folder(config: OnlineDpoConfig, number: int) -> Path:
    output = Path(config.output_dir)
    return output if number == config.rounds else output / f"round-{number}"


def _round(config: OnlineDpoConfig, number: int, adapter: str | None, started: float) -> None:
    """Make pairs with the policy so far and train on them."""
    folder, last = _folder(config, number), number == config.rounds
    pairs = folder / "pairs"
    build = _build_config(config, number, adapter, pairs)
    together(lambda: build_pairs(build))
    diffusion_dpo.run(
        replace(
            config,
            output_dir=str(folder),
            pairs=replace(config.pairs, path=str(pairs), cache_dir=None),
            lora=replace(config.lora, init_from=adapter),
            evaluation=config.evaluation if last else EvalConfig(),
            resume_from_checkpoint="latest",
        ),
        method="online-dpo",
        started=started,
    )


def _build_config(
    config: OnlineDpoConfig, number: int, adapter: str | None, pairs: Path
) -> PairsBuildConfig:
    """Every round draws other candidates."""
    model = {name: getattr(config, name) for name in ModelConfig.__dataclass_fields__}
    how = {name: getattr(config.candidates, name) for name in CandidatesConfig.__dataclass_fields__}
    sampling = config.candidates.sampling
    how["sampling"] = replace(sampling, seed=derive_seed(sampling.seed, "round", number))
    place = {"adapter": adapter, "output": str(pairs), "shard": rank(), "num_shards": world_size()}
    return PairsBuildConfig(**{**model, **how, **place})
