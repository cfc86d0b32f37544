"""Judges: replies are checked, kept and not paid for twice."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mmalign.endpoint import EndpointError
from mmalign.hallucination.judge import Judge
from mmalign.types import InputError


def number(reply: str) -> int:
    if not reply.isdigit():
        raise ValueError("no number")
    return int(reply)


def make(folder: Path, ask: Callable[[str], str], **options: int) -> Judge:
    return Judge(ask, name="judge", replies=folder / "deep" / "replies.jsonl", **options)


def test_replies_come_in_order_and_are_kept(tmp_path: Path) -> None:
    asked: list[str] = []

    def ask(prompt: str) -> str:
        asked.append(prompt)
        return prompt[1:]

    prompts = ["p1", None, "p2", "p3"]
    wheres = ["a", "b", "c", "d"]
    done: list[int] = []
    judge = make(tmp_path, ask, concurrency=3)
    assert judge.ask_all(prompts, number, wheres, lambda: done.append(1)) == [1, None, 2, 3]
    assert len(done) == 3
    assert sorted(asked) == ["p1", "p2", "p3"]
    again = make(tmp_path, lambda prompt: pytest.fail(f"paid twice for {prompt}"))
    assert again.ask_all(prompts, number, wheres) == [1, None, 2, 3]


def test_another_judge_is_asked(tmp_path: Path) -> None:
    make(tmp_path, lambda _: "1").ask_all(["p"], number, ["a"])
    other = Judge(lambda _: "2", name="other", replies=tmp_path / "deep" / "replies.jsonl")
    assert other.ask_all(["p"], number, ["a"]) == [2]


def test_garbage_is_asked_for_again(tmp_path: Path) -> None:
    replies = iter(["garbage", "more", "7"])
    assert make(tmp_path, lambda _: next(replies)).ask_all(["p"], number, ["a"]) == [7]


def test_garbage_that_stays_names_the_row_and_keeps_the_rest(tmp_path: Path) -> None:
    judge = make(tmp_path, lambda p: "bad\nreply" if p == "p2" else "1", concurrency=1)
    with pytest.raises(InputError, match=r"^row 2: judge: no number: 'bad reply' \(3 attempts\)$"):
        judge.ask_all(["p1", "p2", "p3"], number, ["row 1", "row 2", "row 3"])
    kept = [json.loads(line) for line in (tmp_path / "deep/replies.jsonl").read_text().splitlines()]
    assert [row["reply"] for row in kept] == ["1"]


def test_judge_that_is_down_ends_at_once(tmp_path: Path) -> None:
    calls: list[str] = []

    def ask(prompt: str) -> str:
        calls.append(prompt)
        raise EndpointError("judge: http://x cannot be reached")

    judge = make(tmp_path, ask, concurrency=2)
    with pytest.raises(InputError, match=r"^row \d: judge: http://x cannot be reached$"):
        judge.ask_all([f"p{i}" for i in range(9)], number, [f"row {i}" for i in range(9)])
    assert len(calls) <= 2  # what had not begun was not tried


def test_prompts_are_under_way_together(tmp_path: Path) -> None:
    barrier = threading.Barrier(3, timeout=20)

    def ask(prompt: str) -> str:
        barrier.wait()
        return prompt

    judge = make(tmp_path, ask, concurrency=3)
    assert judge.ask_all(["1", "2", "3"], number, ["", "", ""]) == [1, 2, 3]


def test_a_line_that_was_cut_off_is_asked_for_again(tmp_path: Path) -> None:
    judge = make(tmp_path, lambda prompt: prompt)
    judge.ask_all(["1", "2"], number, ["", ""])
    path = tmp_path / "deep/replies.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    fresh = make(tmp_path, lambda prompt: prompt)
    assert fresh.ask_all(["1", "2", "3"], number, ["", "", ""]) == [1, 2, 3]
    last = make(tmp_path, lambda prompt: pytest.fail(f"paid twice for {prompt}"))
    assert last.ask_all(["1", "2", "3"], number, ["", "", ""]) == [1, 2, 3]
