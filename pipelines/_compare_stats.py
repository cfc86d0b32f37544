"""What the runs of a comparison say together: pure functions of their summaries and curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, NamedTuple

Row = Mapping[str, float | None]


class Interval(NamedTuple):
    """A mean over seeds with its 95 % t-interval; bounds are NaN with fewer than two values."""

    mean: float
    low: float
    high: float
    n: int


class PooledRate(NamedTuple):
    """Wins over decided comparisons of all seeds together; NaN when nothing was decided."""

    value: float
    wins: int
    losses: int
    ties: int


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One finished run.

    Attributes:
        seed: its seed.
        summary: its `summary.json`.
        curve: lines of its `evaluations.jsonl`.
        pairs: what building its pairs cost, by the names of `summary["cost"]`.
    """

    seed: int
    summary: Mapping[str, Any]
    curve: Sequence[Row] = ()
    pairs: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """One method over its seeds.

    Attributes:
        name: its label.
        train: its training command.
        judge: name of the judge's metric; None without a judge.
        reward: name of the first reward of the evaluation, which is the one trained on in all
            packaged configurations; None without rewards, and for vision-language models.
        metrics: interval of `win_rate`, of `after/<metric>`, `change/<metric>`, `cost/<what>`
            (pairs included), `steps`, `wall_seconds` and `peak_memory_mib`.
        pooled: win rate of all seeds together.
        curve: means over seeds at the steps that all of them have; costs include the pairs.
        seeds: seeds that finished.
        failed: seeds that did not.
    """

    name: str
    train: str
    judge: str | None
    reward: str | None
    metrics: Mapping[str, Interval]
    pooled: PooledRate
    curve: Sequence[Mapping[str, float]]
    seeds: Sequence[int]
    failed: Sequence[int]

    def metric(self, name: str) -> Interval:
        """Look a metric up; one that no run has is NaN over no values."""
        return self.metrics.get(name, Interval(math.nan, math.nan, math.nan, 0))


def t_interval(values: Sequence[float | None]) -> Interval:
    """Average values with the t-interval mean +- t(0.975, n - 1) s / sqrt(n).

    Values that are missing or not finite are left out: a win rate without decided comparisons.
    """
    known = [v for v in values if v is not None and math.isfinite(v)]
    if len(known) < 2:
        return Interval(known[0] if known else math.nan, math.nan, math.nan, len(known))
    from scipy.special import stdtrit

    mean = fmean(known)
    reach = float(stdtrit(len(known) - 1, 0.975)) * stdev(known) / math.sqrt(len(known))
    return Interval(mean, mean - reach, mean + reach, len(known))


def pooled_rate(runs: Sequence[RunRecord]) -> PooledRate:
    """Add up wins, losses and ties of all seeds."""
    rates = [run.summary["win_rate"] for run in runs if run.summary.get("win_rate") is not None]
    wins, losses, ties = (sum(rate[k] for rate in rates) for k in ("wins", "losses", "ties"))
    decided = wins + losses
    return PooledRate(wins / decided if decided else math.nan, wins, losses, ties)


def aggregate(
    name: str, train: str, runs: Sequence[RunRecord], failed: Sequence[int] = ()
) -> MethodResult:
    """Put the seeds of one method together."""
    values: dict[str, list[float | None]] = {}
    for run in runs:
        for key, value in _run_metrics(run).items():
            values.setdefault(key, []).append(value)
    summary = runs[0].summary if runs else {}
    judge = (summary.get("win_rate") or {}).get("judge")
    first = None if train == "vlm-dpo" else next(iter(summary.get("before", {})), None)
    return MethodResult(
        name=name,
        train=train,
        judge=judge,
        reward=None if first in (judge, "diversity") else first,
        metrics={key: t_interval(found) for key, found in values.items()},
        pooled=pooled_rate(runs),
        curve=mean_curve(runs),
        seeds=[run.seed for run in runs],
        failed=list(failed),
    )


def mean_curve(runs: Sequence[RunRecord]) -> list[dict[str, float]]:
    """Average evaluations along training over seeds, at the steps that every seed has."""
    tables = [{row["step"]: row for row in run.curve} for run in runs]
    if not tables:
        return []
    steps = sorted(set.intersection(*(set(table) for table in tables)))  # type: ignore[type-var]
    found = []
    for step in steps:
        rows = [_with_pairs(t[step], run) for t, run in zip(tables, runs, strict=True)]
        names = [key for key in rows[0] if all(row.get(key) is not None for row in rows)]
        found.append({key: fmean(row[key] or 0.0 for row in rows) for key in names})
    return found


def ranked(results: Sequence[MethodResult]) -> list[MethodResult]:
    """Order by mean win rate, best first; methods without one come last."""

    def key(result: MethodResult) -> float:
        mean = result.metric("win_rate").mean
        return mean if math.isfinite(mean) else -math.inf

    return sorted(results, key=key, reverse=True)


def results_json(results: Sequence[MethodResult]) -> list[dict[str, Any]]:
    """Lay results out for `results.json`; numbers that are not finite become null."""
    return [
        {
            "name": result.name,
            "train": result.train,
            "judge": result.judge,
            "reward": result.reward,
            "seeds": list(result.seeds),
            "failed": list(result.failed),
            "metrics": {
                key: {
                    "mean": _finite(value.mean),
                    "ci95": None if value.n < 2 else [value.low, value.high],
                    "n": value.n,
                }
                for key, value in result.metrics.items()
            },
            "pooled_win_rate": {**result.pooled._asdict(), "value": _finite(result.pooled.value)},
            "curve": [dict(row) for row in result.curve],
        }
        for result in results
    ]


def _run_metrics(run: RunRecord) -> dict[str, float | None]:
    """Flatten a summary, its cost with that of the pairs."""
    summary, pairs = run.summary, run.pairs or {}
    before, after = summary.get("before", {}), summary.get("after", {})
    rate = summary.get("win_rate") or {}
    found: dict[str, float | None] = {"win_rate": rate["value"]} if rate else {}
    for name, value in after.items():
        found[f"after/{name}"] = value
        if name in before and None not in (value, before[name]):
            found[f"change/{name}"] = value - before[name]
    for name, value in summary.get("cost", {}).items():
        found[f"cost/{name}"] = value + pairs.get(name, 0)
    return found | {
        name: summary.get(name) for name in ("steps", "wall_seconds", "peak_memory_mib")
    }


def _with_pairs(row: Row, run: RunRecord) -> dict[str, float | None]:
    """Add the pairs' cost to what training has cost so far."""
    pairs = run.pairs or {}
    return {k: v if v is None or k not in pairs else v + pairs[k] for k, v in row.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
