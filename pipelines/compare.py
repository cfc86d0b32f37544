"""`mmalign compare`: methods at equal budgets over several seeds, judged alike.

Every run is a process of its own, `mmalign train ...` into `<output_dir>/<name>/seed-<s>`, so that
a failure stops nothing else and memory is measured per run. What is complete is skipped, what was
interrupted goes on. Nothing here loads a model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from mmalign.config import CompareConfig
from mmalign.data.files import write_bytes
from mmalign.metrics_log import read_metrics
from mmalign.pipelines._compare_page import write_results
from mmalign.pipelines._compare_plan import (
    Cost,
    Method,
    affordable_steps,
    check_pairs,
    plan_methods,
)
from mmalign.pipelines._compare_runs import Runner, Task, read_summary
from mmalign.pipelines._compare_stats import MethodResult, RunRecord, aggregate, ranked

PAIRS_COST = "cost.json"


def run(config: CompareConfig) -> None:
    """Run everything that is missing, then write `results.md`, `results.json` and `report.html`.

    Raises:
        InputError: unusable options, a budget that does not pay for a step, or a folder that holds
            runs of other options.
        SystemExit: code 1 when a run failed; its log was named when it did, and the results cover
            the others.
    """
    methods = plan_methods(config)
    for method in methods:  # said before anything runs
        check_pairs(config.budget, method.config.name, method.pairs_cost)
    pairs = _pairs_tasks(config, methods)
    probed = methods if config.budget.unit != "steps" else []
    with tqdm(total=len(pairs) + len(probed) + len(methods) * config.seeds, unit="run") as bar:
        runner = Runner(config.processes, bar)
        runner.run(list(pairs.values()))
        runner.run(_probe_tasks(config, probed))
        runner.run(_train_tasks(config, methods))
    results = ranked([_result(config, method) for method in methods])
    tqdm.write(write_results(config, results))
    missing = sum(len(result.failed) for result in results)
    if missing:
        tqdm.write(f"{missing} of {len(methods) * config.seeds} runs are missing from the results")
        raise SystemExit(1)


def _pairs_tasks(config: CompareConfig, methods: list[Method]) -> dict[Path, Task]:
    """List the pairs to build, each folder once."""
    tasks = {}
    for method in methods:
        if method.pairs is None:
            continue
        for seed in range(config.seeds):
            folder = method.pairs.folder(config, seed)
            tasks[folder] = Task(
                label=f"pairs {folder.parent.name} seed {seed}",
                arguments=["pairs", *method.pairs.arguments(config, seed)],
                folder=folder,
                finished=(folder / PAIRS_COST).is_file,
                succeeded=_pairs_done(folder, method.pairs_cost),
                inputs=method.pairs.inputs[seed],
            )
    return tasks


def _pairs_done(folder: Path, cost: Cost) -> Callable[[float], None]:
    def write(seconds: float) -> None:
        text = json.dumps({**cost, "train_seconds": seconds})
        write_bytes(folder / PAIRS_COST, text.encode())

    return write


def _pairs_spent(config: CompareConfig, method: Method, seed: int) -> Cost | None:
    """Read what a seed's pairs cost; None while they are not there."""
    if method.pairs is None:
        return {}
    file = method.pairs.folder(config, seed) / PAIRS_COST
    if not file.is_file():
        return None
    found: dict[str, float] = json.loads(file.read_text("utf-8"))
    return found


def _probe_tasks(config: CompareConfig, methods: Sequence[Method]) -> list[Task]:
    """List the short runs that measure what a step costs; those without pairs would only fail."""
    return [
        Task(
            label=f"{method.config.name} probe",
            arguments=["train", *method.probe_arguments(config)],
            folder=method.probe_folder(config),
            finished=_complete(method.probe_folder(config)),
            inputs=method.inputs[0],
        )
        for method in methods
        if _pairs_spent(config, method, 0) is not None
    ]


def _train_tasks(config: CompareConfig, methods: Sequence[Method]) -> list[Task]:
    """List the runs whose pairs and probe are there, seed by seed."""
    steps = {method.config.name: _steps(config, method) for method in methods}
    return [
        Task(
            label=f"{method.config.name} seed {seed}",
            arguments=["train", *method.arguments(config, seed, count)],
            folder=method.folder(config, seed),
            finished=_complete(method.folder(config, seed)),
            inputs=method.inputs[seed],
        )
        for seed in range(config.seeds)
        for method in methods
        if (count := steps[method.config.name]) is not None
        and _pairs_spent(config, method, seed) is not None
    ]


def _steps(config: CompareConfig, method: Method) -> int | None:
    """Count a method's steps, the same for all seeds; None when its probe failed.

    Raises:
        InputError: the budget does not pay for one.
    """
    per_step: Cost = {}
    if config.budget.unit != "steps":
        probe = read_summary(method.probe_folder(config))
        if probe is None:
            return None
        per_step = {name: value / probe["steps"] for name, value in probe["cost"].items()}
    return affordable_steps(
        config.budget,
        name=method.config.name,
        per_step=per_step,
        pairs=_pairs_spent(config, method, 0) or {},
        own_steps=method.parsed.max_steps,
    )


def _complete(folder: Path) -> Callable[[], bool]:
    return lambda: read_summary(folder) is not None


def _result(config: CompareConfig, method: Method) -> MethodResult:
    """Read a method's runs from their folders."""
    runs, failed = [], []
    for seed in range(config.seeds):
        folder = method.folder(config, seed)
        summary = read_summary(folder)
        if summary is None:
            failed.append(seed)
            continue
        spent = _pairs_spent(config, method, seed)
        curve = read_metrics(folder / "evaluations.jsonl")
        runs.append(RunRecord(seed=seed, summary=summary, curve=curve, pairs=spent))
    return aggregate(method.config.name, method.config.train, runs, failed)
