from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from mmalign.data import labels as module
from mmalign.data.labels import (
    LabelGroup,
    LabelImage,
    Labels,
    LabelsUnavailableError,
    UnknownPairError,
    check_name,
    make_pair,
    show,
)
from mmalign.types import InputError


def image(number: int) -> LabelImage:
    return LabelImage(f"{number:032x}", f"{number}.png")


GROUPS = [LabelGroup(f"prompt {p}", [image(10 * p + i) for i in range(3)]) for p in range(4)]


@pytest.fixture
def labels(tmp_path: Path) -> Iterator[Labels]:
    opened = Labels(tmp_path / "labels.sqlite")
    opened.add(GROUPS)
    yield opened
    opened.close()


def judge_all(labels: Labels, annotator: str, winner: int | None = 0) -> None:
    while shown := labels.next_pairs(annotator, 1):
        (pair,) = shown
        images = sorted((pair.left, pair.right))
        labels.judge(annotator, pair.key, None if winner is None else images[winner])


def test_commits_are_synchronous(labels: Labels) -> None:
    assert labels._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert labels._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_every_prompt_is_shown_before_any_a_second_time(labels: Labels) -> None:
    order = [pair.prompt for pair in labels.next_pairs("ann", 99)]
    assert len(order) == 12
    for start in (0, 4, 8):
        assert len(set(order[start : start + 4])) == 4


def test_people_at_work_at_once_see_unjudged_pairs_first(labels: Labels) -> None:
    seen = []
    for turn in range(12):
        annotator = ("ann", "bob", "cy")[turn % 3]
        (pair,) = labels.next_pairs(annotator, 1)
        labels.judge(annotator, pair.key, pair.left)
        seen.append(pair.key)
    assert len(set(seen)) == 12  # nobody repeats what another did
    (pair,) = labels.next_pairs("ann", 1)
    assert pair.key in seen  # then pairs of others
    assert labels.progress("ann") == (12, 12, 4, 3)
    judge_all(labels, "ann")
    assert labels.progress("ann").mine == 12
    counts = [tally.votes for tally in labels.tallies()]
    assert sorted(counts) == [1] * 4 + [2] * 8


def test_orders_of_people_differ(labels: Labels) -> None:
    first = {labels.next_pairs(name, 1)[0].key for name in "abcdefghij"}
    assert len(first) > 1


def test_sides_are_balanced_and_stay() -> None:
    pairs = [make_pair(f"p{n}", "aa", "bb") for n in range(2000)]
    left = [show(pair, "ann").left == "aa" for pair in pairs]
    assert 900 < sum(left) < 1100
    assert left == [show(pair, "ann").left == "aa" for pair in pairs]
    other = [show(pair, "bob").left == "aa" for pair in pairs]
    assert 900 < sum(a != b for a, b in zip(left, other, strict=True)) < 1100


def test_pair_is_known_by_its_content() -> None:
    pair = make_pair("p", "aa", "bb")
    assert pair == make_pair("p", "bb", "aa")
    assert pair.key != make_pair("q", "aa", "bb").key


def test_winner_is_an_image_not_a_side(labels: Labels) -> None:
    (pair,) = labels.next_pairs("ann", 1)
    labels.judge("ann", pair.key, pair.right)
    row = labels._db.execute("SELECT winner, on_left FROM judgements").fetchone()
    assert row == (pair.right, pair.left)
    (tally,) = labels.tallies()
    assert tally.decision == (pair.right, pair.left)


def test_undo_steps_back(labels: Labels) -> None:
    done = []
    for _ in range(3):
        (pair,) = labels.next_pairs("ann", 1)
        labels.judge("ann", pair.key, None)
        done.append(pair)
    labels.judge("bob", done[2].key, None)
    for pair in reversed(done):
        assert labels.last("ann") == pair.key
        assert labels.undo("ann", pair.key) == pair
        assert labels.undo("ann", pair.key) == pair  # an answer that got lost is asked for again
    assert labels.last("ann") is None
    assert labels.progress("ann") == (12, 1, 0, 1)


def test_same_judgement_again_replaces(labels: Labels) -> None:
    (pair,) = labels.next_pairs("ann", 1)
    for winner in (pair.left, pair.left, pair.right):
        labels.judge("ann", pair.key, winner)
    (tally,) = labels.tallies()
    assert (tally.votes, tally.decision) == (1, (pair.right, pair.left))


def test_what_is_not_there_cannot_be_judged(labels: Labels) -> None:
    (pair,) = labels.next_pairs("ann", 1)
    with pytest.raises(UnknownPairError, match="no pair nonsense"):
        labels.judge("ann", "nonsense", None)
    with pytest.raises(UnknownPairError, match="has no image"):
        labels.judge("ann", pair.key, image(999).hash)
    with pytest.raises(UnknownPairError, match="no pair"):
        labels.undo("ann", "nonsense")
    assert labels.tallies() == []


def test_judgements_outlive_renamed_files_and_fewer_pairs(labels: Labels) -> None:
    judge_all(labels, "ann")
    before = labels.tallies()
    renamed = [LabelImage(i.hash, f"new/{i.path}") for i in GROUPS[0].images]
    labels.unlist()
    labels.add([LabelGroup(GROUPS[0].prompt, renamed)], pairs_per_prompt=2)
    assert labels.progress("ann") == (2, 2, 2, 1)
    assert labels.tallies() == before
    assert labels.path(renamed[0].hash) == "new/0.png"
    assert labels.path("absent") is None


def test_pairs_of_a_lost_image_are_not_shown(labels: Labels) -> None:
    labels.unlist(image(0).hash)
    assert labels.progress("ann").total == 10
    assert image(0) not in labels.images()
    assert image(1) in labels.images()


def test_agreement(labels: Labels) -> None:
    judge_all(labels, "ann")
    assert labels.agreement() == (0, None, None)
    (pair,) = labels.next_pairs("bob", 1)
    labels.judge("bob", pair.key, max(pair.left, pair.right))
    assert labels.agreement()[:2] == (1, 0)
    labels.judge("bob", pair.key, min(pair.left, pair.right))
    assert labels.agreement() == (1, 1, 1)


def test_threads_and_processes_share_the_file(labels: Labels) -> None:
    other = Labels(labels.file)
    threads = [
        Thread(target=judge_all, args=(source, name))
        for name, source in (("ann", labels), ("bob", other), ("cy", labels))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert labels.progress("cy") == (12, 12, 12, 3)
    other.close()


def test_locked_file_changes_nothing(labels: Labels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUSY_SECONDS", 0.01)
    impatient = Labels(labels.file)
    (pair,) = impatient.next_pairs("ann", 1)
    labels._db.execute("BEGIN IMMEDIATE")
    with pytest.raises(LabelsUnavailableError, match=r"cannot write .*labels.sqlite: .*locked"):
        impatient.judge("ann", pair.key, None)
    assert impatient.next_pairs("ann", 1) == [pair]  # reading goes on
    labels._db.execute("ROLLBACK")
    impatient.judge("ann", pair.key, None)
    assert labels.progress("ann").mine == 1
    impatient.close()


def test_full_disk_changes_nothing(labels: Labels) -> None:
    (pages,) = labels._db.execute("PRAGMA page_count").fetchone()
    labels._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(LabelsUnavailableError, match="full"):
        labels.add([LabelGroup("long " * 5000, [image(501), image(502)])])
    assert labels.progress("ann").total == 12
    labels._db.execute("PRAGMA max_page_count = 1000000")
    labels.add([LabelGroup("long " * 5000, [image(501), image(502)])])
    assert labels.progress("ann").total == 13


@pytest.mark.parametrize("content", [b"text, not a database " * 100, None])
def test_other_files_are_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "labels.sqlite"
    if content is None:
        with sqlite3.connect(file) as other:
            other.execute("PRAGMA user_version = 7")
    else:
        file.write_bytes(content)
    with pytest.raises(LabelsUnavailableError, match=r"cannot open .*labels\.sqlite: "):
        Labels(file)
    with pytest.raises(InputError, match="cannot open"):
        Labels(tmp_path / "no folder" / "labels.sqlite")


@pytest.mark.parametrize(
    ("name", "tidy"), [(" Ann  Lee ", "Ann Lee"), ("Bjo\u0308rn", "Bj\u00f6rn")]
)
def test_names_are_tidied(name: str, tidy: str) -> None:
    assert check_name(name) == tidy


@pytest.mark.parametrize("name", ["", "  ", "x" * 41, "a\0b", "a\u202eb", "\ud800"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="a name has"):
        check_name(name)
