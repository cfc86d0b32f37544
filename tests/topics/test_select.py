"""Selection of edits: a hand-worked example, and the authors' rules written down plainly."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from mmalign.topics.select import SelectionRule, contested_facts, mean_score, select_edits
from mmalign.topics.types import Claim, Position

OFFICIAL = SelectionRule(select="last_binary", template="min_edit", min_topics=3)
EXAMPLE = {
    0: [
        Claim("a0", 0.9, (("a0 again", -0.2),)),
        Claim("b0", -0.4),
        Claim("c0", 0.2),
        Claim("d0", 0.6),
    ],
    1: [Claim("a1", -0.7), Claim("b1", 0.5, (("b1 again", 0.4),)), Claim("c1", -0.1)],
    2: [
        Claim("a2", 0.3, (("a2 again", -0.1),)),
        Claim("c2", 0.8, (("c2 again", -0.3),)),
        Claim("d2", -0.6),
        Claim("e2", 0.1),
    ],
}
TOPICS = [
    [(0, 0), (1, 0), (2, 0)],
    [(0, 1), (1, 1)],
    [(0, 2), (1, 2), (2, 1)],
    [(0, 3), (2, 2)],
    [(2, 3)],
]
"""Contested facts: 0 has four (one wrong), 1 has three (two wrong), 2 has three (one wrong)."""


def edits(side: Sequence[Any]) -> list[tuple[str, str]]:
    return [(edit.old, edit.new.text) for edit in side]


def test_hand_worked_example_of_the_authors_rules() -> None:
    """Answers 0 and 2 need one edit on the chosen side; 0 allows more on the rejected side.

    Of each topic the last right and the last wrong candidate count: for a0 the wrong ones are
    a0 again (-0.2), a1 (-0.7) and a2 again (-0.1), met in this order.
    """
    found = select_edits(EXAMPLE, TOPICS, OFFICIAL, draw=1)
    assert found is not None
    assert found.template == 0
    assert edits(found.chosen) == [("b0", "b1 again")]
    assert edits(found.rejected) == [("a0", "a2 again"), ("c0", "c2 again"), ("d0", "d2")]
    assert (found.best, found.worst) == (0, 1)  # means 0.325, -0.1 and 0.15


def test_extreme_takes_the_likeliest_and_the_least_likely() -> None:
    rule = SelectionRule(select="extreme", template="min_edit")
    found = select_edits(EXAMPLE, TOPICS, rule, draw=0)
    assert found is not None
    assert edits(found.chosen) == [("b0", "b1")]
    assert edits(found.rejected) == [("a0", "a1"), ("c0", "c2 again"), ("d0", "d2")]
    assert [edit.new.score for edit in found.rejected] == [-0.7, -0.3, -0.6]


@pytest.mark.parametrize(("hardness", "worst"), [(0.0, "a1"), (0.5, "a0 again"), (1.0, "a2 again")])
def test_hardness_moves_from_the_worst_to_the_least_wrong(hardness: float, worst: str) -> None:
    rule = SelectionRule(template="min_edit", hardness=hardness)
    found = select_edits(EXAMPLE, TOPICS, rule, draw=0)
    assert found is not None
    assert edits(found.rejected)[0] == ("a0", worst)


def test_random_template_is_drawn_among_those_with_enough_topics() -> None:
    found = [select_edits(EXAMPLE, TOPICS, SelectionRule(), draw) for draw in range(6)]
    assert [f.template for f in found if f] == [0, 1, 2, 0, 1, 2]
    four = SelectionRule(min_topics=4)
    assert {f.template for d in range(6) if (f := select_edits(EXAMPLE, TOPICS, four, d))} == {0}


def test_without_a_template_the_means_decide() -> None:
    found = select_edits(EXAMPLE, TOPICS, SelectionRule(min_topics=5), draw=0)
    assert found == (0, 1, None, (), ())


def test_equal_means_rank_the_later_answer_higher() -> None:
    answers = {n: [Claim(f"x{n}", 0.5)] for n in (0, 1, 2)}
    found = select_edits(answers, [], OFFICIAL, draw=0)
    assert found is not None
    assert (found.best, found.worst) == (2, 0)


def test_one_answer_makes_no_pair() -> None:
    assert select_edits({0: EXAMPLE[0]}, TOPICS, OFFICIAL, draw=0) is None


def test_other_facts_of_the_same_answer_are_no_candidates() -> None:
    answers = {0: [Claim("right", 0.5), Claim("wrong", -0.5)], 1: [Claim("other", 0.1)]}
    together: list[list[Position]] = [[(0, 0), (0, 1), (1, 0)]]
    assert contested_facts(0, answers, together, OFFICIAL)[0].fact == 1
    assert len(contested_facts(0, answers, together, OFFICIAL)) == 1


def test_answers_that_cannot_be_used_give_no_candidates() -> None:
    answers = {0: EXAMPLE[0], 2: EXAMPLE[2]}
    contested = contested_facts(0, answers, TOPICS, SelectionRule())
    assert [(c.fact, c.right.text, c.wrong.text) for c in contested] == [
        (0, "a0", "a0 again"),
        (2, "c2", "c2 again"),
        (3, "d0", "d2"),
    ]


def test_a_score_of_zero_is_wrong() -> None:
    answers = {0: [Claim("even", 0.0)], 1: [Claim("right", 0.2)]}
    topics: list[list[Position]] = [[(0, 0), (1, 0)]]
    found = select_edits(answers, topics, SelectionRule(min_topics=1), draw=0)
    assert found is not None
    assert edits(found.chosen) == [("even", "right")]
    never_right = {0: [Claim("even", 0.0)], 1: [Claim("wrong", -0.2)]}
    assert contested_facts(0, never_right, topics, SelectionRule()) == []


def plainly(answers: Any, topics: Any) -> tuple[Any, ...]:
    """The authors' rules, said again without any of the code under test."""
    order = sorted(answers, key=lambda k: mean_score(answers[k]))  # stable: earlier answers first
    order = order[::-1]
    best: tuple[Any, ...] | None = None
    for k in order:
        ups, downs = [], []
        for f, claim in enumerate(answers[k]):
            yes = no = None
            home = next((t for t in topics if (k, f) in t), None)
            for a, b in home or []:
                if a == k and b != f:
                    continue
                for text, score in [(answers[a][b].text, answers[a][b].score), *answers[a][b][2]]:
                    if score > 0:
                        yes = text
                    else:
                        no = text
            if yes is not None and no is not None:
                (downs if claim.score > 0 else ups).append((f, no if claim.score > 0 else yes))
        if len(ups) + len(downs) > 2:
            fewer = best is None or len(ups) < len(best[1])
            same = best is not None and len(ups) == len(best[1])
            if fewer or (same and best is not None and len(downs) > len(best[2])):
                best = (k, ups, downs)
    return best or (None, order[0], order[-1])


def test_official_mode_follows_the_rules_on_random_questions() -> None:
    rng = random.Random(0)
    templates = 0
    for _ in range(300):
        answers = {
            k: [
                Claim(
                    f"{k}.{f}",
                    rng.choice([-0.8, -0.3, 0.2, 0.7]),
                    tuple(
                        (f"{k}.{f}+{r}", rng.choice([-0.5, 0.4])) for r in range(rng.randint(0, 2))
                    ),
                )
                for f in range(rng.randint(1, 5))
            ]
            for k in range(rng.randint(2, 5))
        }
        positions = [(k, f) for k, facts in answers.items() for f in range(len(facts))]
        rng.shuffle(positions)
        cuts = sorted(rng.sample(range(len(positions)), k=min(3, len(positions) - 1)))
        topics = [
            sorted(positions[a:b])
            for a, b in zip([0, *cuts], [*cuts, len(positions)], strict=True)
            if a < b
        ]
        found, plain = select_edits(answers, topics, OFFICIAL, draw=0), plainly(answers, topics)
        assert found is not None
        if plain[0] is None:
            assert found == (plain[1], plain[2], None, (), ())
            continue
        templates += 1
        sides = [[(e.fact, e.new.text) for e in side] for side in (found.chosen, found.rejected)]
        assert (found.template, *sides) == plain
    assert templates > 50
