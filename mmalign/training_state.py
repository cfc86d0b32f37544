"""What a checkpoint of a run holds, and the rules of resuming."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.training_utils import EMAModel
from torch import nn

from mmalign.checkpoint import (
    Checkpoint,
    DamagedCheckpointError,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    pack,
    save_checkpoint,
    step_of,
    unpack,
)
from mmalign.config import TrainConfig, as_path
from mmalign.processes import from_main, gather, together, world_size
from mmalign.sharding import divided_like, full, own_part
from mmalign.types import InputError

BATCH = "samples per step (batch size x accumulation x processes)"
FORWARD = "samples per forward of all processes"

logger = logging.getLogger(__name__)


class Stateful(Protocol):
    """Something that changes during training and belongs in the checkpoint."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return dicts, lists, tensors and scalars."""
        ...

    def load_state_dict(self, state: Any) -> object:
        """Restore what `state_dict` returned."""
        ...


class TrainingState:
    """Trainable parameters, optimizer, loss scaler, average and further parts of one run.

    `last_step` and `last_path` name the checkpoint saved or loaded last. Where `coupled` is set the
    samples of a forward, on all processes together, change each other's loss, so a resumed run may
    not divide a step into other forwards.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        accelerator: Accelerator,
        parameters: Mapping[str, nn.Parameter],
        optimizer: AcceleratedOptimizer,
        ema: EMAModel | None,
        parts: Mapping[str, Stateful],
    ) -> None:
        """Remember the objects; their state is read and written later."""
        self._config, self._accelerator = config, accelerator
        self._parameters, self._optimizer, self._ema = parameters, optimizer, ema
        self._parts, self.coupled = parts, False
        self._folder = Path(config.output_dir) / "checkpoints"
        self.last_step = 0
        self.last_path: Path | None = None

    @property
    def finished(self) -> bool:
        """Whether a part has an attribute `finished` that is true: training ends early."""
        return any(getattr(part, "finished", False) for part in self._parts.values())

    def save(self, step: int) -> None:
        """Save a checkpoint of `step`, on the main process.

        Raises:
            InputError: it cannot be written, or a weight is not finite; earlier checkpoints are
                intact.
        """
        if not self.finite:
            what = f"step {step}: weights are no longer finite"
            raise InputError(f"{what}; lower learning_rate; {self.kept}")
        skeleton, tensors = pack(self._capture())
        weights = {name: full(value.detach()) for name, value in self._parameters.items()}
        from_main(
            lambda: save_checkpoint(
                self._folder,
                step,
                {"model": weights, "training": tensors},
                {"run": _identity(self._config, self.coupled), "training": skeleton},
                self._config.save_total_limit,
            )
        )
        self.last_step, self.last_path = step, self._folder / f"checkpoint-{step}"

    @property
    def finite(self) -> bool:
        """Whether all weights are finite, on all processes; they all have to ask."""
        finite = (bool(own_part(p).isfinite().all()) for p in self._parameters.values())
        return all(gather(all(finite)))

    @property
    def kept(self) -> str:
        """Say where the weights of the last checkpoint are."""
        return f"last good weights: {self.last_path or 'those it began with'}"

    def resume(self) -> int:
        """Restore the checkpoint that `resume_from_checkpoint` asks for.

        Returns:
            The step to continue from, 0 for a fresh run. `latest` without any checkpoint is a fresh
            run: the process was killed before the first save.

        Raises:
            InputError: the checkpoint is damaged, of another run or beyond `max_steps`, newer ones
                would be overtaken, a fresh run would mix with the checkpoints of an earlier one, or
                processes see different folders.
        """
        step = together(self._resume)
        if len(set(gather(step))) > 1:
            raise InputError(
                f"{self._folder}: processes found different checkpoints there; output_dir must be"
                " on a file system that all of them share"
            )
        return step

    def _resume(self) -> int:
        wanted, existing = self._config.resume_from_checkpoint, list_checkpoints(self._folder)
        if wanted is None:
            if existing:
                raise InputError(
                    f"{self._folder}: holds checkpoints of an earlier run; continue it with"
                    " resume_from_checkpoint: latest, or choose another output_dir"
                )
            return 0
        path = latest_checkpoint(self._folder) if wanted == "latest" else as_path(wanted)
        if path is None:
            logger.warning("%s: no checkpoint yet, starting at step 0", self._folder)
            return 0
        checkpoint = load_checkpoint(path)
        newer = [p for p in existing if step_of(p) > checkpoint.step]
        if newer and wanted != "latest":
            raise InputError(
                f"{newer[-1]}: is newer than the checkpoint to resume from; move it away or choose"
                " another output_dir"
            )
        try:
            self._restore(checkpoint)
        except InputError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            # Its files are whole, so nobody damaged it: another version or somebody else wrote it.
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise DamagedCheckpointError(
                f"{path}: its contents are not those of a run ({what})"
            ) from error
        check_length(path, checkpoint, self._config)
        self.last_step, self.last_path = checkpoint.step, path
        return checkpoint.step

    def _capture(self) -> dict[str, Any]:
        scaler = self._accelerator.scaler
        return {
            "optimizer": {
                name: {k: full(v) for k, v in self._optimizer.state[p].items()}
                for name, p in self._parameters.items()
            },
            "scaler": None if scaler is None else scaler.state_dict(),
            "ema": None if self._ema is None else self._ema.state_dict(),
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
        }

    def _restore(self, checkpoint: Checkpoint) -> None:
        check_same_run(checkpoint, self._config, coupled=self.coupled)
        saved = {name: list(value.shape) for name, value in checkpoint.tensors["model"].items()}
        shapes = {name: list(value.shape) for name, value in self._parameters.items()}
        _must_match(checkpoint, "trained weights", saved, shapes)
        training = unpack(checkpoint.state["training"], checkpoint.tensors["training"])
        _must_match(
            checkpoint,
            "saved parts",
            {"parts": sorted(training["parts"]), "ema": training["ema"] is not None},
            {"parts": sorted(self._parts), "ema": self._ema is not None},
        )
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                saved_value = checkpoint.tensors["model"][name].to(parameter.dtype)
                parameter.copy_(divided_like(saved_value, parameter))
        self._restore_optimizer(training["optimizer"])
        scaler = self._accelerator.scaler
        if scaler is not None and training["scaler"] is not None:
            scaler.load_state_dict(training["scaler"])
        if self._ema is not None:
            # The decay is an option and may have been changed since.
            self._ema.load_state_dict({**training["ema"], "decay": self._config.ema_decay})
            self._ema.to(self._accelerator.device)
        for name, part in self._parts.items():
            part.load_state_dict(training["parts"][name])

    def _restore_optimizer(self, saved: Mapping[str, Any]) -> None:
        """Restore the moments; learning rate and the like come from the configuration."""
        state = {
            index: {k: divided_like(v, parameter) for k, v in saved[name].items()}
            for index, (name, parameter) in enumerate(self._parameters.items())
            if saved[name]
        }
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})


def check_same_run(checkpoint: Checkpoint, config: TrainConfig, *, coupled: bool = False) -> None:
    """Refuse a checkpoint of another trajectory: of another method, seed or batch size.

    Args:
        checkpoint: read from the folder of a run.
        config: options of this run.
        coupled: the samples of a forward, on all processes together, change each other's loss.

    Raises:
        InputError: naming what differs.
    """
    identity = _identity(config, coupled)
    _must_match(checkpoint, "run", _division(checkpoint.state.get("run"), identity), identity)


def check_length(path: Path, checkpoint: Checkpoint, config: TrainConfig) -> None:
    """Refuse a checkpoint that is beyond the end of this run.

    Raises:
        InputError: it has more than `max_steps` steps.
    """
    if checkpoint.step > config.max_steps:
        have, limit = checkpoint.step, config.max_steps
        raise InputError(f"{path}: has {have} steps already, more than max_steps: {limit}")


def _identity(config: TrainConfig, coupled: bool) -> dict[str, str | int]:
    """What must be equal for a resumed run to continue the same trajectory.

    The samples of a step are the same however many processes and forwards share them.
    """
    forward = config.per_device_train_batch_size * world_size()
    division = {BATCH: forward * config.gradient_accumulation_steps}
    if coupled:
        division[FORWARD] = forward
    return {"config": type(config).__name__, "seed": config.seed, **division}


def _division(saved: Any, identity: Mapping[str, Any]) -> Any:
    """Read how a step was divided; the first checkpoints name its factors instead."""
    factors = ("per_device_train_batch_size", "num_processes", "gradient_accumulation_steps")
    if not isinstance(saved, dict) or not all(isinstance(saved.get(f), int) for f in factors):
        return saved
    rest = {name: value for name, value in saved.items() if name not in factors}
    forward = saved[factors[0]] * saved[factors[1]]
    known = {BATCH: forward * saved[factors[2]], FORWARD: forward}
    return rest | {name: value for name, value in known.items() if name in identity}


def _must_match(checkpoint: Checkpoint, what: str, saved: Any, current: Mapping[str, Any]) -> None:
    if saved == current:
        return
    there = saved if isinstance(saved, dict) else {}
    for key in dict.fromkeys([*current, *there]):
        if key not in there or key not in current or there[key] != current[key]:
            before, now = there.get(key, "missing"), current.get(key, "missing")
            raise InputError(
                f"{checkpoint.path}: cannot resume, its {what} differ from this run's:"
                f" {key} was {before}, now {now}"
            )
