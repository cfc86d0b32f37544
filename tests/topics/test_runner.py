"""Stages as files: nothing is done twice, and nothing stale is used."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmalign.config import GenerationConfig, TopicOverwriteConfig
from mmalign.topics.items import Item
from mmalign.topics.runner import (
    UNREADABLE,
    StageFile,
    describe,
    load_stage,
    losses,
    run_stage,
)
from mmalign.topics.stages import Resample, Sample, Split
from mmalign.types import InputError


@pytest.fixture
def setting(
    config: Callable[..., TopicOverwriteConfig],
    read: Any,
    make_team: Any,
    world: Any,
    tmp_path: Path,
) -> Callable[..., Any]:
    """Questions, the first two stages, and the folder of their files."""

    def make(count: int = 5, **options: Any) -> Any:
        settings = config(count, **options)
        team = make_team(world)
        return (
            read(settings),
            Sample(team, settings),
            Split(team, settings),
            tmp_path / "out" / "stages",
        )

    return make


def rows(folder: Path, name: str = "sample") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_results_are_written_in_order_and_found_again(setting: Any, world: Any) -> None:
    items, sample, split, folder = setting()
    run_stage(sample, items, folder)
    run_stage(split, items, folder)
    assert [row["id"] for row in rows(folder)] == [f"q{n}" for n in range(5)]
    assert sorted(path.name for path in folder.iterdir()) == ["sample.jsonl", "split.jsonl"]
    spent, before = dict(world.log), (folder / "split.jsonl").read_bytes()
    again, sample, split, _ = setting()
    run_stage(sample, again, folder)
    run_stage(split, again, folder)
    assert world.log == spent
    assert (folder / "split.jsonl").read_bytes() == before
    assert [item.results for item in again] == [item.results for item in items]
    assert all(item.picture is None for item in again)


def test_a_killed_run_goes_on_and_ends_alike(setting: Any, world: Any) -> None:
    items, sample, _, folder = setting()
    run_stage(sample, items, folder)
    whole = (folder / "sample.jsonl").read_bytes()
    (folder / "sample.jsonl").unlink()
    world.log.clear()
    world.fail_after = 12  # in the second pair of questions; they are saved two by two
    items, sample, _, _ = setting()
    with pytest.raises(KeyboardInterrupt):
        run_stage(sample, items, folder)
    assert [path.name for path in folder.iterdir()] == [".sample.partial.jsonl"]
    with (folder / ".sample.partial.jsonl").open("a") as stream:
        stream.write('{"id": "q2", "key": "')  # killed in the middle of a line
    world.log.clear()
    world.fail_after = 8  # the second pair is saved behind the line that is cut off
    items, sample, _, _ = setting()
    with pytest.raises(KeyboardInterrupt):
        run_stage(sample, items, folder)
    world.log.clear()
    world.fail_after = None
    items, sample, _, _ = setting()
    run_stage(sample, items, folder)
    assert world.log["generate"] == 4
    assert (folder / "sample.jsonl").read_bytes() == whole


def test_more_questions_leave_the_others_alone(setting: Any, world: Any) -> None:
    items, sample, _, folder = setting(3)
    run_stage(sample, items, folder)
    before = rows(folder)
    world.log.clear()
    items, sample, _, _ = setting(5)
    run_stage(sample, items, folder)
    assert world.log["generate"] == 2 * 4
    assert rows(folder)[:3] == before


def test_fewer_questions_keep_the_results_of_the_others(setting: Any, world: Any) -> None:
    items, sample, _, folder = setting(5)
    run_stage(sample, items, folder)
    before = (folder / "sample.jsonl").read_bytes()
    world.log.clear()
    items, sample, _, _ = setting(5, limit=2)
    assert len(items) == 2
    run_stage(sample, items, folder)
    items, sample, _, _ = setting(5)
    run_stage(sample, items, folder)
    assert world.log == {}
    assert (folder / "sample.jsonl").read_bytes() == before


@pytest.mark.parametrize("seed", ["sampling", "resampling"])
def test_seeds_of_answers_are_other_draws(seed: str, setting: Any, world: Any) -> None:
    found = []
    for number in (0, 3):
        drawn = {seed: GenerationConfig(temperature=1, seed=number)}
        items, sample, _, folder = setting(2, **drawn)
        resample = Resample(sample.team, sample.config)
        for item in items:
            item.results["ask"] = {"facts": [[["cat is red.", "What is the cat?"]]] * 6}
        stage = sample if seed == "sampling" else resample
        run_stage(stage, items, folder)
        found.append([item.results[stage.name] for item in items])
    assert found[0] != found[1]


@pytest.mark.parametrize("change", [{"seed": 1}, {"responses": 3}])
def test_other_options_are_other_results(change: Any, setting: Any, world: Any) -> None:
    items, sample, split, folder = setting()
    run_stage(sample, items, folder)
    run_stage(split, items, folder)
    items, sample, split, _ = setting(**change)
    with pytest.raises(InputError, match=r"sample.jsonl: the result of question q0 was made with"):
        load_stage(sample, items, folder)
    world.log.clear()
    run_stage(sample, items, folder)
    assert world.log["generate"] == 5 * change.get("responses", 4)


def test_options_that_change_nothing_keep_results(setting: Any, world: Any) -> None:
    items, sample, _, folder = setting()
    run_stage(sample, items, folder)
    world.log.clear()
    items, sample, _, _ = setting(chunk=5, select="last_binary")
    run_stage(sample, items, folder)
    assert world.log == {}


def test_results_of_changed_inputs_are_not_used(setting: Any, world: Any) -> None:
    items, sample, split, folder = setting()
    run_stage(sample, items, folder)
    run_stage(split, items, folder)
    world.log.clear()
    items[1].results["sample"] = {"answers": ["cat is red.", "cat is blue.", "", ""]}
    for item in items:
        del item.results["split"]
    run_stage(split, items, folder)
    assert world.log["split"] == 2
    assert items[1].results["split"]["facts"] == [["cat is red."], ["cat is blue."], [], []]


def test_a_stage_alone_needs_the_ones_before(setting: Any) -> None:
    items, sample, _, folder = setting()
    with pytest.raises(InputError, match=r"q0 is missing; run --until sample first"):
        load_stage(sample, items, folder)
    run_stage(sample, items, folder)
    fresh, sample, _, _ = setting()
    load_stage(sample, fresh, folder)
    assert [item.results for item in fresh] == [item.results for item in items]


def test_damaged_lines_are_done_again(setting: Any, world: Any) -> None:
    items, sample, _, folder = setting()
    run_stage(sample, items, folder)
    lines = (folder / "sample.jsonl").read_text().splitlines()
    lines[1] = lines[1][:20]
    lines[2] = '{"id": "q2", "key": "x", "result": 3}'
    (folder / "sample.jsonl").write_text("\n".join([*lines, "[]", ""]))
    world.log.clear()
    items, sample, _, _ = setting()
    run_stage(sample, items, folder)
    assert world.log["generate"] == 2 * 4


def test_cost_is_said_before_the_work(
    setting: Any, caplog: pytest.LogCaptureFixture, world: Any
) -> None:
    items, sample, _, folder = setting(3)
    with caplog.at_level(logging.INFO, logger="mmalign"):
        run_stage(sample, items[:1], folder)
        run_stage(sample, items, folder)
    assert caplog.messages == [
        "sample: 1 questions: 4 generations",
        "sample: 2 questions, 1 done before: 8 generations",
    ]
    assert describe(sample, [], 3) == "sample: 0 questions, 3 done before"


def test_unreadable_images_stop_or_are_dropped(setting: Any) -> None:
    items, sample, split, folder = setting(3)
    whole = items[1].image.data.read_bytes()
    items[1].image.data.write_bytes(whole[:50])
    with pytest.raises(InputError, match=r"questions.jsonl line 2: the image cannot be decoded"):
        run_stage(sample, items, folder)
    items, sample, split, folder = setting(3, on_bad_row="skip")
    items[1].image.data.write_bytes(whole[:50])
    run_stage(sample, items, folder)
    run_stage(split, items, folder)
    assert [item.dropped for item in items] == [None, UNREADABLE, None]
    assert "split" not in items[1].results
    assert losses(items)["dropped"] == {UNREADABLE: 1}


def test_losses_are_counted_by_reason() -> None:
    def item(**results: Any) -> Item:
        made = Item("x", "?", None, "", "")  # type: ignore[arg-type]
        made.results = results
        return made

    items = [
        item(a={"lost": {"facts": 2}}, b={"lost": {"facts": 1, "answers": 4}}),
        item(a={"dropped": "why"}),
        item(a={"dropped": "why", "lost": {"answers": 1}}),
        item(a={"dropped": "other"}),
    ]
    assert losses(items) == {
        "dropped": {"why": 2, "other": 1},
        "lost": {"answers": 5, "facts": 3},
    }


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "stages").write_text("a file")
    with pytest.raises(InputError, match="cannot write"):
        StageFile(tmp_path / "stages", "sample").append({"a": ("key", {})})
