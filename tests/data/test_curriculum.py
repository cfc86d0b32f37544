from __future__ import annotations

import logging
from itertools import combinations, pairwise

import pytest
import torch

from mmalign.config import CurriculumConfig
from mmalign.data.curriculum import (
    CurriculumSampler,
    assign_buckets,
    curriculum_stages,
    rank_gap_buckets,
    score_gap_thresholds,
)
from mmalign.data.order import BatchPlan
from mmalign.types import InputError

Scores = list[tuple[float | None, float | None]]


def all_pairs(scores: list[float]) -> Scores:
    return [(max(a, b), min(a, b)) for a, b in combinations(scores, 2)]


def test_rank_gap_intervals_of_the_paper() -> None:
    golden = [(399.2, 499.0), (299.4, 399.2), (199.6, 299.4), (99.8, 199.6), (0.0, 99.8)]
    for got, want in zip(rank_gap_buckets(500, 5), golden, strict=True):
        assert got == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(("candidates", "buckets"), [(500, 5), (6, 5), (11, 5), (4, 5), (9, 3)])
def test_rank_gap_buckets_hold_their_intervals(candidates: int, buckets: int) -> None:
    # Uneven scores: only ranks may matter. Pairs of the best with every other candidate.
    scores = [float(k) ** 3 for k in range(candidates)]
    pairs: Scores = [(scores[-1], score) for score in scores[:-1]]
    config = CurriculumConfig(num_buckets=buckets)
    found = assign_buckets(["p"] * len(pairs), pairs, config)
    intervals = rank_gap_buckets(candidates, buckets)
    for bucket, gap in zip(found, range(candidates - 1, 0, -1), strict=True):
        low, high = intervals[bucket]
        assert low + 1e-9 < gap <= high + 1e-9


def test_equal_scores_share_a_rank() -> None:
    # The scores 0, 1, 2 and 3 come up ten times and make four ranks.
    pairs: Scores = [(3.0, 0.0), (3.0, 1.0), (1.0, 0.0), (3.0, 2.0), (2.0, 1.0)]
    config = CurriculumConfig(num_buckets=3)
    assert assign_buckets(["p"] * 5, pairs, config) == [0, 1, 2, 2, 2]


def test_score_gap_of_the_authors_code() -> None:
    pairs = all_pairs([0.10, 0.35, 0.20, 0.90, 0.55])
    gaps = [chosen - rejected for chosen, rejected in pairs]
    golden = [0.8, 0.66, 0.52, 0.38, 0.24, 0.1]
    assert score_gap_thresholds(gaps, 5) == pytest.approx(golden, abs=1e-9)
    config = CurriculumConfig(difficulty="score_gap", scope="global", keep_threshold=0.02)
    stages = curriculum_stages(["p"] * 10, pairs, config)
    assert [len(stage) for stage in stages] == [2, 3, 4, 7, 10]
    for stage, threshold in zip(stages[:-1], golden[1:], strict=False):
        assert stage == [i for i, gap in enumerate(gaps) if gap >= threshold]


def test_scope_decides_what_a_gap_is_compared_with() -> None:
    prompts = ["a"] * 3 + ["b"] * 3
    pairs = all_pairs([0.0, 1.0, 3.0]) + all_pairs([0.0, 10.0, 30.0])
    for difficulty in ("rank_gap", "score_gap"):
        config = CurriculumConfig(difficulty=difficulty, scope="prompt", num_buckets=2)
        per_prompt = assign_buckets(prompts, pairs, config)
        assert per_prompt[:3] == per_prompt[3:]
        config = CurriculumConfig(difficulty=difficulty, scope="global", num_buckets=2)
        overall = assign_buckets(prompts, pairs, config)
        assert overall[:3] == [1, 1, 1]
        assert 0 in overall[3:]


def test_ranks_belong_to_a_prompt() -> None:
    prompts = ["a", "a", "b"]
    pairs: Scores = [(2.0, 0.0), (1.0, 0.0), (1.5, 0.5)]
    assert assign_buckets(prompts, pairs, CurriculumConfig(num_buckets=2)) == [0, 1, 0]


def test_gaps_are_absolute() -> None:
    pairs: Scores = [(0.0, 2.0), (1.0, 0.0)]
    for difficulty in ("rank_gap", "score_gap"):
        config = CurriculumConfig(difficulty=difficulty, num_buckets=2)
        assert assign_buckets(["p"] * 2, pairs, config) == [0, 1]


@pytest.mark.parametrize("difficulty", ["rank_gap", "score_gap"])
def test_small_gaps_and_ties_are_dropped(difficulty: str) -> None:
    pairs: Scores = [(2.0, 0.0), (2.0, 2.0), (0.25, 0.0), (1.0, 0.0)]
    config = CurriculumConfig(difficulty=difficulty, num_buckets=2)
    assert assign_buckets(["p"] * 4, pairs, config)[1] is None
    config = CurriculumConfig(difficulty=difficulty, num_buckets=2, keep_threshold=0.25)
    found = assign_buckets(["p"] * 4, pairs, config)
    assert [bucket is None for bucket in found] == [False, True, True, False]


def test_stages_are_cumulative() -> None:
    pairs = all_pairs([float(k) for k in range(8)])
    stages = curriculum_stages(["p"] * len(pairs), pairs, CurriculumConfig())
    assert len(stages) == 5
    for easy, hard in pairwise(stages):
        assert set(easy) < set(hard)
    assert sorted(stages[-1]) == list(range(len(pairs)))
    assert {pairs[i] for i in stages[0]} == {(7.0, 0.0), (7.0, 1.0), (6.0, 0.0)}


def test_empty_buckets_are_merged_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    pairs: Scores = [(10.0, 0.0), (9.5, 0.0), (1.0, 0.0)]
    config = CurriculumConfig(difficulty="score_gap")
    with caplog.at_level(logging.WARNING):
        assert curriculum_stages(["p"] * 3, pairs, config) == [[0, 1], [0, 1, 2]]
    assert "2 of 5 buckets" in caplog.text


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(1.0, None), (2.0, 0.0)], "pair 0"),
        ([(2.0, 0.0), (None, 1.0)], "pair 1"),
        ([(2.0, 0.0), (float("nan"), 1.0)], "pair 1"),
        ([(1.0, 1.0), (2.0, 2.0)], "no pair has a score gap"),
        ([], "no pair has a score gap"),
    ],
)
def test_unusable_scores_are_refused(pairs: Scores, message: str) -> None:
    with pytest.raises(InputError, match=message):
        curriculum_stages(["p"] * len(pairs), pairs, CurriculumConfig())


def test_one_bucket_for_everything_is_refused() -> None:
    # Two scored images per prompt: every rank gap is 1, the largest there is.
    prompts, pairs = ["a", "b"], [(2.0, 0.0), (5.0, 4.0)]
    with pytest.raises(InputError, match="bucket 1 of 5"):
        curriculum_stages(prompts, pairs, CurriculumConfig())
    assert curriculum_stages(prompts, pairs, CurriculumConfig(num_buckets=1)) == [[0, 1]]


@pytest.mark.parametrize("change", [{"num_buckets": 0}, {"keep_threshold": -0.1}])
def test_options_out_of_range_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        assign_buckets(["p"], [(1.0, 0.0)], CurriculumConfig(**change))


STAGES = [[4, 7], [4, 7, 1, 0, 9], [4, 7, 1, 0, 9, 2, 3]]


def sampler(start_step: int = 0, max_steps: int = 40, **changes: int) -> CurriculumSampler:
    plan = BatchPlan(
        **{"seed": 1, "batch_size": 3, "gradient_accumulation_steps": 2, **changes},
        max_steps=max_steps,
        start_step=start_step,
    )
    return CurriculumSampler(STAGES, 10, plan)


def test_stage_is_a_function_of_the_step() -> None:
    stages = [sampler().stage(step) for step in (0, 9, 10, 19, 20, 29, 30, 1000)]
    assert stages == [0, 0, 1, 1, 2, 2, 2, 2]


def test_every_pair_of_a_stage_comes_once_per_epoch() -> None:
    for stage, steps in enumerate([range(10), range(10, 20), range(20, 40)]):
        drawn = [i for batch in sampler() for step, i in batch if step in steps]
        size = len(STAGES[stage])
        assert len(drawn) == len(steps) * 6
        for start in range(0, len(drawn) - size + 1, size):
            assert sorted(drawn[start : start + size]) == sorted(STAGES[stage])


def test_resume_at_every_step_equals_the_uninterrupted_run() -> None:
    whole = list(sampler())
    for start in range(41):
        assert list(sampler(start_step=start)) == whole[2 * start :]


def test_accumulation_does_not_move_stages() -> None:
    split = [item for batch in sampler() for item in batch]
    whole = [
        item for batch in sampler(batch_size=6, gradient_accumulation_steps=1) for item in batch
    ]
    assert split == whole


def test_stages_and_seeds_have_their_own_order() -> None:
    same = [list(range(30))] * 2
    plan = BatchPlan(seed=0, batch_size=30, max_steps=2)
    first, second = CurriculumSampler(same, 1, plan)
    assert [i for _, i in first] != [i for _, i in second]
    other = next(iter(CurriculumSampler(same, 1, BatchPlan(seed=1, batch_size=30, max_steps=2))))
    assert first != other


def test_data_loader_takes_the_sampler() -> None:
    loader = torch.utils.data.DataLoader(
        {(s, i): (s, i) for s in range(40) for i in range(10)},
        batch_sampler=sampler(start_step=9),
        collate_fn=lambda items: items,
    )
    assert list(loader) == list(sampler(start_step=9))


@pytest.mark.parametrize(("stages", "stage_steps"), [([[1]], 0), ([], 5), ([[], [1]], 5)])
def test_unusable_stages_are_refused(stages: list[list[int]], stage_steps: int) -> None:
    with pytest.raises(InputError, match="curriculum"):
        CurriculumSampler(stages, stage_steps, BatchPlan(seed=0, batch_size=1, max_steps=1))
