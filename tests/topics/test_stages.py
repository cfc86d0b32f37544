"""Every stage by itself and all in a row, in a world of rules."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from mmalign.data.images import decode
from mmalign.endpoint import EndpointError
from mmalign.pipelines.topic_overwrite import make_stages
from mmalign.topics.cluster import cluster_facts
from mmalign.topics.editing import NO_TEMPLATE, NOT_IN_ORDER, NOTHING_LEFT, SAME_TEXT
from mmalign.topics.grouping import topics_of
from mmalign.topics.items import Item, claims_of, facts_of
from mmalign.topics.select import mean_score
from mmalign.topics.stages import TOO_FEW
from mmalign.topics.team import Cost, Job
from mmalign.topics.types import Check
from mmalign.types import InputError


@pytest.fixture
def go(config: Any, read: Any, make_team: Any, world: Any) -> Callable[..., list[Item]]:
    """Run all stages up to one on all questions at once."""

    def run(until: str = "rescore", count: int = 5, **options: Any) -> list[Item]:
        settings = config(count, **options)
        items: list[Item] = read(settings)
        for item in items:
            item.picture = decode(item.image, 10**6)
        for stage in make_stages(make_team(world), settings, {}):
            live = [item for item in items if item.dropped is None]
            for item, result in zip(live, stage.run(live), strict=True):
                item.results[stage.name] = result
            if stage.name == until:
                break
        return items

    return run


def test_answers_depend_on_seed_and_question_alone(go: Any) -> None:
    many, few = go("sample"), go("sample", count=2)
    assert [item.results for item in few] == [item.results for item in many[:2]]
    assert len({tuple(item.results["sample"]["answers"]) for item in many}) == len(many)
    assert all(len(item.results["sample"]["answers"]) == 4 for item in many)
    other = go("sample", count=2, seed=1)
    assert other[0].results != few[0].results


def test_equal_answers_are_split_once(go: Any, world: Any) -> None:
    items = go("split")
    answers = {a for item in items for a in item.results["sample"]["answers"]}
    assert world.log["split"] == len(answers)


def test_chosen_facts_are_right_and_rejected_ones_wrong(go: Any) -> None:
    items = [item for item in go(min_topics=1) if item.dropped is None]
    edited = [item for item in items if item.results["select"]["template"] is not None]
    assert len(edited) >= 3
    for item in edited:
        select, rewrite, scored = (item.results[n] for n in ("select", "rewrite", "rescore"))
        claims = claims_of(item)[select["template"]]
        for edit in select["chosen"]:
            assert claims[edit["fact"]].score <= 0 < edit["new_score"]
            assert edit["new"] in rewrite["chosen"]["text"]
            assert edit["old"] not in rewrite["chosen"]["text"]
        for edit in select["rejected"]:
            assert claims[edit["fact"]].score > 0 >= edit["new_score"]
            assert edit["new"] in rewrite["rejected"]["text"]
        assert scored["chosen"]["score"] >= mean_score(claims) >= scored["rejected"]["score"]
        assert scored["chosen"]["score"] > scored["rejected"]["score"]
        assert "right" not in rewrite["chosen"]
        words = [len(rewrite[side]["text"].split()) for side in ("chosen", "rejected")]
        assert words[0] == words[1]  # the same template: no side is longer


def test_scores_are_the_labellers(go: Any, world: Any) -> None:
    (item, *_) = go("score")
    for claims in claims_of(item).values():
        for claim in claims:
            yes, no = world.probabilities([item.ask(f"Is it so? {claim.text}")])[0]
            assert claim.score == pytest.approx(yes - no)
            assert len(claim.resampled) == 1


def test_denials_turn_the_answer_around(go: Any, world: Any, monkeypatch: Any) -> None:
    straight = claims_of(go("score", count=1)[0])

    def deny(statements: Any) -> Any:
        return [[Check(f"Is it so? {s.text}", False) for s in group] for group in statements]

    monkeypatch.setattr(world, "verify", deny)
    turned = claims_of(go("score", count=1)[0])
    for number, claims in straight.items():
        assert [c.score for c in turned[number]] == pytest.approx([-c.score for c in claims])


def test_asking_clip_first_changes_no_edge(go: Any, world: Any) -> None:
    """The edges are those of asking all three tests about every pair, and so are the topics."""
    items = go("cluster", responses=5)
    asked = {name: world.log[name] for name in ("judge fact", "judge question")}
    every = 0
    for item in items:
        facts, wh = facts_of(item), item.results["verify"]["facts"]
        pairs = [(a, b) for a, b in itertools.combinations(sorted(facts), 2) if a[0] != b[0]]
        every += len({(facts[a], facts[b]) for a, b in pairs})
        questions = {(k, f): wh[k][f]["wh"] for k, f in facts}
        alike = world.same_topic([(facts[a], facts[b]) for a, b in pairs], "fact")
        same = world.same_topic([(questions[a], questions[b]) for a, b in pairs], "question")
        close = [facts[a][1] == facts[b][1] for a, b in pairs]  # what `World.maps` amounts to
        full = [p for p, *tests in zip(pairs, alike, same, close, strict=True) if all(tests)]
        found = [((a, b), (c, d)) for a, b, c, d in item.results["judge"]["edges"]]
        assert found == full
        assert len(full) < sum(close) < len(pairs)
        seedless = cluster_facts(list(facts), full, resolution=1.0, seed=0)
        assert sorted(map(sorted, topics_of(item))) == sorted(map(sorted, seedless))
    assert asked["judge fact"] < every
    assert asked["judge question"] < asked["judge fact"]


def test_costs_are_what_is_asked(config: Any, read: Any, make_team: Any, world: Any) -> None:
    settings = config(3, min_topics=1)
    items = read(settings)
    for item in items:
        item.picture = decode(item.image, 10**6)
    costs: dict[str, Cost] = {}
    for stage in make_stages(make_team(world), settings, {}):
        costs[stage.name] = stage.cost(items)
        before = dict(world.log)
        for item, result in zip(items, stage.run(items), strict=True):
            item.results[stage.name] = result
        spent = {k: v - before.get(k, 0) for k, v in world.log.items()}
        total = sum(costs[stage.name])
        if (
            stage.name == "judge"
        ):  # an upper bound: pairs that fail the first test are not asked again
            assert 0 < spent["judge fact"] + spent["judge question"] < total
        elif stage.name == "similarity":
            assert costs["similarity"] == Cost(crops=3 * 25)
        elif stage.name == "rescore":  # an estimate: how many facts come out is not known
            assert total > 0
        else:
            assert sum(spent.values()) == total, stage.name
    assert costs["sample"] == Cost(generations=12)
    assert costs["cluster"] == costs["select"] == Cost()


def test_answers_without_facts_do_not_count(go: Any, world: Any, monkeypatch: Any) -> None:
    replies = iter([["cat is black.", "mat is red."], [], ["cat is red."], []])
    monkeypatch.setattr(world, "split", lambda answers: [next(replies) for _ in answers])
    (item,) = go("score", count=1)
    assert item.dropped is None
    assert list(claims_of(item)) == [0, 2]
    assert item.results["split"]["lost"] == {"answers without facts": 2}


@pytest.mark.parametrize("stage", ["split", "ask", "verify"])
def test_questions_end_without_two_usable_answers(
    stage: str, go: Any, world: Any, monkeypatch: Any
) -> None:
    def nothing(groups: Sequence[Any]) -> Any:
        return [[None] * len(group) for group in groups] if stage != "split" else [[]] * len(groups)

    monkeypatch.setattr(world, stage, nothing)
    items = go(count=2)
    assert [item.dropped for item in items] == [TOO_FEW, TOO_FEW]
    assert list(items[0].results)[-1] == stage


@pytest.mark.parametrize(
    ("text", "policy", "how"),
    [
        ("", "fallback", "fallback"),
        ("Question: what?\nNew answer: cat is black.", "fallback", "fallback"),
        ("cat", "drop", None),
    ],
)
def test_failed_rewriting(
    text: str, policy: str, how: str | None, go: Any, world: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(world, "rewrite", lambda requests: [text] * len(requests))
    items = go("rewrite", min_topics=1, on_bad_rewrite=policy)
    edited = [i for i in items if i.results["select"]["template"] is not None]
    assert edited
    for item in edited:
        sides, select = item.results["rewrite"], item.results["select"]
        faulty = [side for side in ("chosen", "rejected") if sides[side].get("fault")]
        assert faulty == [side for side in ("chosen", "rejected") if select[side]]
        if how is None:
            assert item.dropped is not None
            assert item.dropped.startswith("the rewritten ")
            continue
        answers = item.results["sample"]["answers"]
        for side, number in (("chosen", "best"), ("rejected", "worst")):
            if side in faulty:
                assert sides[side]["how"] == how
                assert sides[side]["text"] == answers[select[number]]


def test_rewriting_that_makes_things_up_is_found_out(go: Any, world: Any, monkeypatch: Any) -> None:
    """Every rewritten answer claims that the dog is red, and nothing else is true of it."""
    lie = "dog is red. cat is red. mat is black. hat is red. sky is red."
    monkeypatch.setattr(world, "rewrite", lambda requests: [lie] * len(requests))
    items = go(min_topics=1, template="min_edit")
    both = [i for i in items if i.results["select"]["chosen"] and i.results["select"]["rejected"]]
    assert {item.dropped for item in both} == {SAME_TEXT}
    only = [i for i in items if i.results["select"]["chosen"] and i not in both]
    rest = {i.dropped for i in only}
    assert rest <= {NOT_IN_ORDER}
    kept = go(min_topics=1, template="min_edit", rescore=False)
    assert NOT_IN_ORDER not in {item.dropped for item in kept}


def test_rewritten_answers_without_facts_are_dropped(go: Any, world: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        world, "rewrite", lambda rs: [f"Nothing of note, number {n}!" for n, _ in enumerate(rs)]
    )
    items = go(min_topics=1)
    edited = [i for i in items if i.results["select"]["template"] is not None]
    assert {item.dropped for item in edited} == {NOTHING_LEFT}


def test_without_a_template_there_is_the_ranking_or_nothing(go: Any) -> None:
    for item in go(min_topics=50):
        if item.dropped is None:
            select, sides = item.results["select"], item.results["rewrite"]
            answers = item.results["sample"]["answers"]
            assert sides["chosen"]["text"] == answers[select["best"]]
            assert sides["rejected"]["text"] == answers[select["worst"]]
            assert {side["how"] for side in sides.values()} == {"ranked"}
    assert {item.dropped for item in go(min_topics=50, fallback="drop")} == {NO_TEMPLATE}


def test_failing_endpoint_names_the_row(go: Any, world: Any, monkeypatch: Any) -> None:
    def fail(questions: Sequence[Any]) -> Any:
        error = EndpointError("endpoint m: its reply has no text")
        error.index = len(questions) - 1
        raise error

    monkeypatch.setattr(world, "probabilities", fail)
    with pytest.raises(InputError, match=r"questions.jsonl line 3: endpoint m: its reply has no"):
        go("score", count=3)


@pytest.mark.parametrize("pair", [(float("nan"), 0.1), (1.2, 0.0), (-0.5, 0.0), (0.5,)])
def test_labels_must_be_probabilities(pair: Any, go: Any, world: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(world, "probabilities", lambda questions: [pair] * len(questions))
    with pytest.raises(InputError, match=r"questions.jsonl line 1: the labeller answers"):
        go("score", count=1)


def test_missing_replies_are_noticed(go: Any, world: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(world, "probabilities", lambda questions: [(1.0, 0.0)])
    with pytest.raises(InputError, match=r"line 1: 1 replies to \d+ tasks"):
        go("score", count=1)


def test_no_model_is_loaded_for_nothing(go: Any, config: Any, make_team: Any, world: Any) -> None:
    items = [item for item in go("select", min_topics=50) if item.dropped is None]
    assert items
    jobs = [Job("unused", pytest.fail) for _ in range(4)]
    idle = dict(zip(("splitter", "writer", "labeller", "rewriter"), jobs, strict=True))
    team = replace(make_team(world), **idle)
    for stage in make_stages(team, config(min_topics=50), {})[-2:]:
        for item, result in zip(items, stage.run(items), strict=True):
            item.results[stage.name] = result
