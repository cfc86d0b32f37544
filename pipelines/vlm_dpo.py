"""`mmalign train vlm-dpo`: the DPO family on a vision-language model and pairs of answers."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from mmalign import sharding
from mmalign.accelerator import make_accelerator, prepare_model
from mmalign.adapters import load_vlm, no_file_bars
from mmalign.adapters._vlm import VlmFamily
from mmalign.config import VlmDpoConfig, dump_config
from mmalign.data.order import BatchPlan, GroupedOrder, batch_indices
from mmalign.data.readers import LISTED
from mmalign.data.vlm_readers import VlmPairTable, read_vlm_pairs
from mmalign.objectives.vlm import check_used
from mmalign.objectives.vlm_rows import Preset, plan
from mmalign.pipelines._training import begin_folder
from mmalign.pipelines._vlm_evaluation import Evaluator
from mmalign.pipelines._vlm_meter import VlmMeter
from mmalign.pipelines._vlm_pairs import EncodedPairs, FeatureCache
from mmalign.pipelines._vlm_preset import resolve_preset
from mmalign.pipelines._vlm_reference import ReferenceScores
from mmalign.pipelines._vlm_results import write_vlm_results
from mmalign.pipelines._vlm_rows import RowMaker, Sample
from mmalign.pipelines._vlm_similarity import clip_similarity
from mmalign.pipelines._vlm_step import StepParts, VlmBatch, VlmStep
from mmalign.pipelines._vlm_trial import load_trial
from mmalign.processes import from_main, is_main, together
from mmalign.reference import make_reference
from mmalign.report import RunSummary
from mmalign.sharding import full, unwrapped
from mmalign.trainer import Trainer
from mmalign.training_state import Stateful
from mmalign.types import Branches, InputError
from mmalign.vlm_lora import attach_vlm_lora, save_vlm_lora

logger = logging.getLogger(__name__)


def run(config: VlmDpoConfig, *, started: float | None = None) -> RunSummary:
    """Train on pairs, save the adapter, evaluate, and write the run folder.

    Args:
        config: everything.
        started: when the job that this is part of began, by `time.monotonic`.

    Raises:
        InputError: anything in the options, the pairs or the model is unusable.
    """
    started = time.monotonic() if started is None else started
    output = Path(config.output_dir)
    preset, trial = resolve_preset(config), load_trial(config)
    check_used(preset, config)
    table = read_vlm_pairs(config.pairs)
    logger.info(
        "%d pairs, %d ties dropped, %d bad rows skipped",
        len(table.pairs),
        table.ties,
        len(table.bad_rows),
    )
    accelerator = make_accelerator(config, cpu=config.device == "cpu")
    # A model that is divided may be larger than one device.
    place = torch.device("cpu") if sharding.requested() else accelerator.device
    adapter = load_vlm(config, place, for_training=True)
    adapter.max_pixels = config.pairs.max_pixels
    pairs = EncodedPairs(
        table.pairs, adapter, max_length=config.max_length, on_bad_row=config.pairs.on_bad_row
    )
    resolved = dump_config(config)
    changes = from_main(lambda: begin_folder(output, resolved))
    evaluator = Evaluator(adapter, config, trial)
    job = _Job(config, adapter, accelerator, pairs, preset)
    # A LoRA that was just attached changes nothing, so this is the base, in the same precision.
    before = evaluator.measure("evaluate base")
    trainer = job.trainer()
    with job.meter.running():
        together(job.fill_reference)
        result = trainer.train()
    adapter.policy = unwrapped(adapter.policy)
    with ExitStack() as stack:
        if trainer.ema is not None:
            stack.enter_context(trainer.averaged_weights())
        together(lambda: _save(config, adapter, output))
        evaluation = evaluator.compare(before, evaluator.measure("evaluate aligned"))
    cost = job.meter.cost()
    summary = from_main(
        lambda: write_vlm_results(
            config,
            evaluation,
            steps=result.step,
            wall_seconds=time.monotonic() - started,
            device=str(accelerator.device),
            warnings=[*changes, *result.warnings, *_skipped(table), *job.notes()],
            cost=cost,
        )
    )
    if accelerator.is_main_process:
        tqdm.write(f"report: {output / 'report.html'}")
    return summary


class _Job:
    """The parts of a run, wired."""

    def __init__(
        self,
        config: VlmDpoConfig,
        adapter: VlmFamily,
        accelerator: Accelerator,
        pairs: EncodedPairs,
        preset: Preset,
    ) -> None:
        self._config, self._adapter, self._accelerator = config, adapter, accelerator
        self._pairs = pairs
        self._grouped = GroupedOrder(pairs.image_keys, config.seed) if config.group_images else None
        self._prepare_policy()
        self._reference = make_reference(adapter, config.lora, config, attribute="policy")
        if sharding.requested():
            self._shard()
        adapter.policy = prepare_model(accelerator, adapter.policy)
        self._features = FeatureCache(adapter, pairs, config.image_cache_mib)
        self.meter = VlmMeter()
        self.meter.watch(adapter.model)
        folder = Path(config.cache_dir or Path(config.output_dir) / "cache")
        text_weights = adapter.model.get_input_embeddings().weight
        # Divided weights want all processes to run as many forwards, which a cache does not.
        uncached = config.reference_update != "never" or sharding.requested()
        self._scores = ReferenceScores(
            adapter,
            self._reference,
            folder=folder if config.cache_reference and not uncached else None,
            share_prefix=config.share_prefix,
            energies=bool(plan(preset).ref_hidden),
            # Full fine-tuning holds in float32 what a LoRA leaves as it was loaded.
            precision=f"{accelerator.mixed_precision} {text_weights.dtype}",
        )
        maker = RowMaker(
            adapter,
            pairs,
            self._features,
            preset,
            seed=config.seed,
            similarity=clip_similarity(config, str(accelerator.device)),
            own_answer=self._own_answer,
        )
        parts = StepParts(
            adapter=adapter,
            pairs=pairs,
            maker=maker,
            reference=self._reference,
            scores=self._scores,
            preset=preset,
        )
        self._step = VlmStep(parts, config)

    def trainer(self) -> Trainer:
        """Make the trainer."""
        state: dict[str, Stateful] = {"meter": self.meter}
        if self._config.reference_update != "never":
            state["reference"] = self._reference
        trainer = Trainer(
            self._config,
            accelerator=self._accelerator,
            module=self._adapter.policy,
            step=self._step,
            batches=self._batches,
            state=state,
            on_step=self._reference.update,
        )
        trainer.coupled = self._step.coupled
        return trainer

    def fill_reference(self) -> None:
        """Compute the reference's log-probs of every sample the run will see.

        Raises:
            InputError: the cache cannot be written.
        """
        if not self._scores.cached:
            return
        samples = dict.fromkeys(s for batch in self._batches(0) for s in batch.samples)
        groups = (self._step.reference_groups(sample) for sample in samples)
        self._scores.fill(groups, len(samples))

    def notes(self) -> list[str]:
        """Say what was left out."""
        pairs = self._pairs
        counts = {
            "pairs dropped, too long for the context": len(pairs.dropped),
            "pairs dropped, unusable": len(pairs.bad),
            "pairs with an answer that was shortened to fit": pairs.truncated,
        }
        notes = [f"{count} {what}" for what, count in counts.items() if count]
        if sharding.requested() and self._config.cache_reference:
            notes.append("cache_reference: without effect, because weights were divided")
        return notes

    def _shard(self) -> None:
        """Divide the decoder layers of the policy, and of a reference that has its own."""
        config = self._config
        if config.ema_decay is not None or config.reference_update != "never":
            raise InputError(
                "ema_decay, reference_update: divided weights have no average and move no reference"
            )
        scorers: list[Any] = [self._adapter.policy, self._reference.network]
        for scorer in scorers:
            if scorer is not None:
                layers = scorer.model.model.language_model.layers
                sharding.shard_layers(layers, self._accelerator.device)
                sharding.place_rest(scorer, self._accelerator.device)
        self._adapter.device = self._accelerator.device

    def _prepare_policy(self) -> None:
        """Attach what is trained; vision tower and projector stay frozen."""
        config, model = self._config, self._adapter.model
        scorer: Any = self._adapter.policy
        scorer.logits_chunk = config.logits_chunk
        self._adapter.fingerprint  # noqa: B018 - of the weights as they are before training
        if config.lora.enabled:
            attach_vlm_lora(model, config.lora, config.seed)
        else:
            for part in (model.model.language_model, model.get_output_embeddings()):
                part.to(torch.float32).requires_grad_(True)
        if config.gradient_checkpointing:
            self._adapter.checkpoint_activations()

    def _batches(self, start_step: int) -> Iterator[VlmBatch]:
        """Yield the micro-batches that follow `start_step` optimizer steps."""
        config = self._config
        division = BatchPlan(
            seed=config.seed,
            batch_size=config.per_device_train_batch_size,
            max_steps=config.max_steps,
            start_step=start_step,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            num_processes=self._accelerator.num_processes,
            process_index=self._accelerator.process_index,
        )
        size, count = len(self._pairs), division.batch_size
        for step in range(start_step, config.max_steps):
            for position in division.positions():
                number = step * division.batches_per_step + position
                if self._grouped is not None:
                    indices = self._grouped.batch(number, count)
                else:
                    indices = batch_indices(number, size=size, batch_size=count, seed=config.seed)
                samples = tuple(
                    Sample(index, (number * count + i) // size) for i, index in enumerate(indices)
                )
                yield VlmBatch(tuple(self._pairs[s.number].pair_id for s in samples), samples)

    def _own_answer(self, branches: Branches) -> torch.Tensor:
        scorer: Any = unwrapped(self._adapter.policy)
        tokens: torch.Tensor = scorer.likeliest([branches])[0][0]
        return tokens.cpu()


def _skipped(table: VlmPairTable) -> list[str]:
    """Say which rows were left out before the model saw them."""
    bad = table.bad_rows
    some = "; ".join(map(str, bad[:LISTED]))
    notes = [f"{len(bad)} bad rows skipped, among them: {some}"] if bad else []
    return [*notes, *([f"{table.ties} ties dropped"] if table.ties else [])]


def _save(config: VlmDpoConfig, adapter: VlmFamily, output: Path) -> None:
    """Write the adapter, or the whole model after full fine-tuning."""
    if config.lora.enabled:
        save_vlm_lora(adapter.model, output / "adapter", config.model)
        return
    state = {name: full(value) for name, value in adapter.model.state_dict().items()}
    if not is_main():
        return
    try:
        with no_file_bars():
            adapter.model.save_pretrained(
                output / "model", state_dict=state, safe_serialization=True
            )
            adapter.chat.processor.save_pretrained(output / "model")
    except OSError as error:
        raise InputError(f"{output / 'model'}: cannot be written: {error}") from error
