"""Aggregation over seeds and budget arithmetic, worked by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mmalign.cli import COMMANDS
from mmalign.config import (
    TRAIN_CONFIGS,
    BudgetConfig,
    BudgetUnit,
    CompareConfig,
    MethodConfig,
    PairsBuildConfig,
    SamplingConfig,
)
from mmalign.pipelines._compare_page import markdown, page, percent, signed, write_results
from mmalign.pipelines._compare_plan import (
    affordable_steps,
    check_pairs,
    pairs_cost,
    plan_methods,
)
from mmalign.pipelines._compare_stats import (
    MethodResult,
    RunRecord,
    aggregate,
    pooled_rate,
    ranked,
    t_interval,
)
from mmalign.types import InputError


def run(seed: int, wins: int, losses: int, **more: Any) -> RunRecord:
    decided = wins + losses
    rate = {
        "value": wins / decided if decided else None,
        "wins": wins,
        "losses": losses,
        "ties": 2,
        "judge": "exact",
    }
    summary = {
        "before": {"clip": 0.5, "exact": 0.4, "diversity": 0.2},
        "after": {"clip": 0.6 + seed / 10, "exact": 0.5, "diversity": 0.1, "kl": 3.0},
        "win_rate": rate,
        "cost": {"unet_forwards": 100, "reward_queries": 0, "train_seconds": 2.0},
        "steps": 7,
        "wall_seconds": 9.0,
        "peak_memory_mib": 50.0,
    }
    return RunRecord(seed=seed, summary=summary, **more)


def test_t_interval_by_hand() -> None:
    found = t_interval([1.0, 2.0, 6.0])
    # Mean 3, s = sqrt((4 + 1 + 9) / 2) = sqrt 7, t(0.975, 2) = 4.302653.
    assert found.mean == 3
    assert found.high - 3 == pytest.approx(4.302653 * math.sqrt(7 / 3), rel=1e-6)
    assert 3 - found.low == pytest.approx(found.high - 3)
    assert found.n == 3


def test_one_or_no_value_has_no_interval() -> None:
    one = t_interval([None, 0.5, math.nan])
    assert (one.mean, one.n) == (0.5, 1)
    assert math.isnan(one.low)
    assert math.isnan(t_interval([]).mean)


def test_pooled_rate_counts_comparisons_not_seeds() -> None:
    found = pooled_rate([run(0, 9, 1), run(1, 0, 0), run(2, 15, 15)])
    assert found == (24 / 40, 24, 16, 6)
    assert math.isnan(pooled_rate([run(0, 0, 0)]).value)


def test_aggregate() -> None:
    pairs = {"unet_forwards": 40.0, "reward_queries": 8.0, "train_seconds": 1.0}
    found = aggregate("a", "mapo", [run(0, 3, 1, pairs=pairs), run(1, 1, 3, pairs=pairs)], [2])
    assert (found.judge, found.reward, found.seeds, found.failed) == ("exact", "clip", [0, 1], [2])
    assert found.metric("win_rate").mean == 0.5
    assert found.metric("change/clip").mean == pytest.approx(0.15)
    assert found.metric("change/exact").mean == pytest.approx(0.1)
    assert found.metric("after/kl").mean == 3
    assert found.metric("cost/unet_forwards").mean == 140
    assert found.metric("cost/reward_queries").mean == 8
    assert found.metric("cost/train_seconds").mean == 3
    assert found.metric("change/kl").n == 0


def test_curve_is_the_mean_at_common_steps() -> None:
    def curve(*rows: tuple[int, float]) -> list[dict[str, float | None]]:
        return [{"step": s, "clip": v, "unet_forwards": 10.0 * s} for s, v in rows]

    pairs = {"unet_forwards": 5.0}
    runs = [
        run(0, 1, 1, curve=curve((0, 1.0), (2, 2.0), (4, 9.0)), pairs=pairs),
        run(1, 1, 1, curve=curve((0, 3.0), (2, 4.0)), pairs=pairs),
    ]
    assert aggregate("a", "mapo", runs).curve == [
        {"step": 0, "clip": 2.0, "unet_forwards": 5.0},
        {"step": 2, "clip": 3.0, "unet_forwards": 25.0},
    ]
    assert aggregate("a", "mapo", []).curve == []


@pytest.mark.parametrize(
    ("unit", "amount", "steps"),
    [
        ("steps", 12, 12),  # pairs take no steps
        ("unet_forwards", 1000, 9),  # (1000 - 100) / 96 = 9.4
        ("seconds", 25, 10),  # (25 - 5) / 2
        ("reward_queries", 60, 77),  # steps cost none: the configuration's own
    ],
)
def test_affordable_steps(unit: BudgetUnit, amount: float, steps: int) -> None:
    per_step = {"unet_forwards": 96.0, "reward_queries": 0.0, "train_seconds": 2.0}
    pairs = {"unet_forwards": 100.0, "reward_queries": 50.0, "train_seconds": 5.0}
    budget = BudgetConfig(unit=unit, amount=amount)
    assert affordable_steps(budget, name="a", per_step=per_step, pairs=pairs, own_steps=77) == steps


def test_budget_that_pays_for_nothing() -> None:
    budget = BudgetConfig(unit="unet_forwards", amount=150)
    with pytest.raises(InputError, match=r"dpo needs 100 for its pairs and 96 per step, and 150"):
        affordable_steps(
            budget,
            name="dpo",
            per_step={"unet_forwards": 96.0},
            pairs={"unet_forwards": 100.0},
            own_steps=1,
        )
    with pytest.raises(InputError, match="the pairs of dpo alone need 200 unet_forwards, of 150"):
        check_pairs(budget, "dpo", {"unet_forwards": 200.0})


@pytest.mark.parametrize(
    ("family", "guidance", "rows"),
    [("sd", 2.5, 72), ("sd", 1.0, 36), ("lcm", 2.5, 36)],
)
def test_pairs_cost(family: Any, guidance: float, rows: int, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red\na red\nred\n")  # one of them twice
    config = PairsBuildConfig(
        prompts=str(prompts),
        family=family,
        candidates_per_prompt=6,
        sampling=SamplingConfig(num_inference_steps=3, guidance_scale=guidance),
    )
    assert pairs_cost(config) == {"unet_forwards": rows, "reward_queries": 12}


def test_family_is_read_from_the_model(tiny_lcm: Path, tiny_sd: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red\n")
    rows = []
    for model in (tiny_lcm, tiny_sd):
        config = PairsBuildConfig(model=str(model), prompts=str(prompts))
        rows.append(pairs_cost(config)["unet_forwards"])
    assert rows[1] == 2 * rows[0]


def test_every_training_command_can_be_compared() -> None:
    commands = {w[1]: c.config for w, c in COMMANDS.items() if w[0] == "train"}
    del commands["online-dpo"]  # its rounds are runs of their own, each with its own cost
    assert {name: cls.__name__ for name, cls in TRAIN_CONFIGS.items()} == commands


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "a/b", "train": "draft"}, "must be letters"),
        ({"name": "a", "train": "drift"}, "'drift' is not one of"),
        ({"name": "a", "train": "draft", "options": {"learnin": 1}}, "methods.a: .*learning_rate"),
        ({"name": "a", "train": "draft", "options": {"seed": 1}}, "seed is set by the comparison"),
        ({"name": "a", "train": "draft", "pairs": "shapes_pairs"}, "draft takes no pairs"),
        ({"name": "a", "train": "draft", "config": "none_such"}, "methods.a: .*no such file"),
    ],
)
def test_bad_method_is_named(method: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_methods(CompareConfig(methods=[MethodConfig(**method)]))


def test_names_are_needed_once_each() -> None:
    with pytest.raises(InputError, match="methods: is required"):
        plan_methods(CompareConfig())
    same = MethodConfig(name="a", train="draft")
    with pytest.raises(InputError, match="a is there twice"):
        plan_methods(CompareConfig(methods=[same, same]))


def test_method_options_win_over_common_ones() -> None:
    config = CompareConfig(
        evaluation={"num_prompts": 4},
        options={"learning_rate": 0.5, "lora.targets": ["a"]},
        curve_points=4,
        methods=[
            MethodConfig(
                name="a",
                train="draft",
                options={"learning_rate": 0.25, "evaluation.prompts": "p.txt"},
            )
        ],
    )
    arguments = plan_methods(config)[0].arguments(config, 3, 10)
    assert arguments[0] == "draft"
    for expected in (
        "--learning_rate=0.25",
        '--lora.targets=["a"]',
        "--evaluation.num_prompts=4",
        "--evaluation.every_steps=2",
        "--max_steps=10",
        "--seed=3",
        "--sampling.seed=1000003",
    ):
        assert arguments.count(expected) == 1
    assert "--learning_rate=0.5" not in arguments


def results() -> list[MethodResult]:
    curve: list[dict[str, float | None]] = [
        {"step": s, "clip": 0.5 + s / 50, "exact": 0.4 - s / 90, "unet_forwards": 9.0 * s}
        for s in (0, 5, 10)
    ]
    worse = aggregate("worse", "draft", [run(0, 1, 3, curve=curve), run(1, 2, 3)], [2])
    better = aggregate("<better>", "d3po", [run(0, 3, 1, curve=curve), run(1, 3, 2, curve=curve)])
    return ranked([worse, aggregate("none", "rocm", [], [0, 1, 2]), better])


def test_table_and_page(tmp_path: Path) -> None:
    config = CompareConfig(output_dir=str(tmp_path), seeds=3)
    found = results()
    assert [result.name for result in found] == ["<better>", "worse", "none"]
    lines = markdown(config, found).splitlines()
    assert lines[0].startswith(
        "| method | win rate | pooled | judge | reward | diversity | KL | seeds |"
    )
    assert lines[2].startswith("| <better> | 68 % [0 %, 100 %] | 67 % 6:3 | +0.100 [")
    assert lines[2].endswith(" | 2 | 7 | 0 | 100 | 2 | 50 |")
    assert " | 2 (1 failed) | " in lines[3]
    assert lines[4].startswith("| none | \u2013 | \u2013 | \u2013 | ")
    assert " | 0 (3 failed) | " in lines[4]
    assert "3 seeds" in lines[6]
    text = page(config, found)
    assert "&lt;better&gt;" in text
    assert "<better>" not in text
    assert "<script" not in text
    assert text.count("<svg") == 3  # of the one method whose seeds all have a curve
    assert "exact against clip" in text


def test_files(tmp_path: Path) -> None:
    config = CompareConfig(output_dir=str(tmp_path), seeds=3)
    shown = write_results(config, results())
    assert str(tmp_path / "report.html") in shown
    content = json.loads((tmp_path / "results.json").read_text())
    first = content["methods"][0]
    assert first["pooled_win_rate"]["value"] == pytest.approx(6 / 9)
    assert first["metrics"]["win_rate"]["mean"] == pytest.approx(0.675)
    assert len(first["metrics"]["win_rate"]["ci95"]) == 2
    assert content["methods"][2]["pooled_win_rate"]["value"] is None


def test_one_seed_has_no_interval_and_says_so(tmp_path: Path) -> None:
    config = CompareConfig(output_dir=str(tmp_path), seeds=1)
    text = markdown(config, [aggregate("a", "draft", [run(0, 3, 1)])])
    assert "| 75 % |" in text
    assert "One seed: no interval." in text


def test_numbers_as_text() -> None:
    assert [signed(v) for v in (0.0123, -0.0123, -0.0001)] == ["+0.012", "\u22120.012", "0.000"]
    assert [percent(v) for v in (-0.2, 0.614, 1.3)] == ["0 %", "61 %", "100 %"]
