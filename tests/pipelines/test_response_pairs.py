"""From a file of answers to scores, to pairs, to training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmalign.cli import main
from mmalign.config import VlmPairsConfig
from mmalign.data.vlm_readers import read_vlm_pairs

ROWS: list[dict[str, Any]] = [
    {"image": "a.png", "prompt": "What?", "response": "A dog on a bench.", "objects": ["dog"]},
    {"image": "a.png", "prompt": "What?", "response": "A dog.", "objects": ["dog"]},
    {"image": "a.png", "prompt": "What?", "response": "A dog.", "objects": ["dog"]},
    {"image": "a.png", "prompt": "Where?", "response": "A car, a dog.", "objects": ["dog"]},
    {"image": "b.png", "prompt": "What?", "response": "A car.", "objects": ["car"]},
    {"image": "copy.png", "prompt": "What?", "response": "A cat, a dog.", "objects": ["car"]},
]
RUN = Callable[..., tuple[int, str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, color in (("a", "red"), ("b", "blue"), ("copy", "blue")):
        Image.new("RGB", (20, 20), color).save(tmp_path / f"{name}.png")
    write(tmp_path / "answers.jsonl", ROWS)
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> RUN:
    def start(*arguments: str) -> tuple[int, str]:
        code = main(list(arguments))
        captured = capsys.readouterr()
        return code, captured.err if code else captured.out + captured.err

    return start


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def build(run: RUN, folder: Path, rewards: list[dict[str, Any]], *more: str) -> tuple[int, str]:
    return run(
        *("pairs", "build", "--responses", str(folder / "answers.jsonl"), "--device", "cpu"),
        *("--output", str(folder / "out"), "--rewards", json.dumps(rewards), *more),
    )


def sides(folder: Path) -> list[tuple[str, str]]:
    return [(row["chosen"], row["rejected"]) for row in read(folder / "out" / "pairs.jsonl")]


def test_scores_stand_beside_the_rows(run: RUN, folder: Path) -> None:
    arguments = ["score", "--responses", str(folder / "answers.jsonl"), "--reward"]
    arguments += ['["chair", "length"]', "--output", str(folder / "scored.jsonl")]
    code, out = run(*arguments)
    assert code == 0
    assert "6 answers scored, 0 skipped" in out
    scored = read(folder / "scored.jsonl")
    assert [{k: v for k, v in row.items() if k != "scores"} for row in scored] == ROWS
    assert [row["scores"]["chair"] for row in scored] == [-0.5, 0, 0, -0.5, 0, -1.0]
    assert [row["scores"]["length"] for row in scored] == [5, 2, 2, 4, 2, 4]
    arguments[-1] = str(folder / "scored.parquet")
    assert run(*arguments)[0] == 0
    table = pq.read_table(folder / "scored.parquet").to_pydict()
    assert list(table) == ["prompt", "response", "chair", "length"]
    assert table["chair"] == [-0.5, 0, 0, -0.5, 0, -1.0]


def test_pairs_are_of_one_question_about_one_image(run: RUN, folder: Path) -> None:
    code, out = build(run, folder, [{"name": "chair"}])
    assert code == 0
    assert "2 pairs in" in out
    assert "1 questions without two answers" in out
    assert sides(folder) == [("A dog.", "A dog on a bench."), ("A car.", "A cat, a dog.")]
    row = read(folder / "out" / "pairs.jsonl")[0]
    assert (row["score_chosen"], row["score_rejected"], row["margin"]) == (0, -0.5, 0.5)
    table = read_vlm_pairs(VlmPairsConfig(path=str(folder / "out" / "pairs.jsonl")))
    assert len(table.pairs) == 2
    assert table.pairs[0].pair_id == row["pair_id"]
    data = table.pairs[1].images[0].data
    assert isinstance(data, Path)
    assert data.read_bytes() == (folder / "b.png").read_bytes()


def test_scores_of_the_file_are_not_computed_again(run: RUN, folder: Path) -> None:
    rows = [{**row, "scores": {"chair": float(i)}} for i, row in enumerate(ROWS)]
    write(folder / "answers.jsonl", rows)
    code, out = build(run, folder, [{"name": "chair", "options": {"labels": "/nowhere"}}])
    assert (code, "answers scored" in out) == (0, False)
    assert sides(folder) == [("A dog.", "A dog on a bench."), ("A cat, a dog.", "A car.")]
    write(folder / "answers.jsonl", [{**rows[0], "scores": {"chair": "high"}}, *rows[1:]])
    assert (
        "line 1: the score chair is 'high', not a number"
        in build(run, folder, [{"name": "chair"}])[1]
    )


def test_eval_only_and_pareto(run: RUN, folder: Path) -> None:
    """Fewer invented objects and fewer words agree; by length alone the longer answer would win."""
    rewards = [{"name": "chair"}, {"name": "length", "weight": -0.01}]
    assert build(run, folder, rewards, "--rule", "pareto")[0] == 0
    assert sides(folder) == [("A dog.", "A dog on a bench."), ("A car.", "A cat, a dog.")]
    rewards = [{"name": "chair"}, {"name": "length"}]
    code, error = build(run, folder, rewards, "--rule", "pareto")
    assert (code, "no pairs" in error) == (2, True)
    rewards = [{"name": "chair"}, {"name": "length", "weight": 100, "eval_only": True}]
    assert build(run, folder, rewards)[0] == 0
    assert sides(folder) == [("A dog.", "A dog on a bench."), ("A car.", "A cat, a dog.")]
    table = read(folder / "out" / "scores.jsonl")
    assert [row["score"] for row in table] == [-0.5, 0, 0, -0.5, 0, -1.0]
    assert table[0]["scores"] == {"chair": -0.5, "length": 5.0}


def test_cache_is_shared_between_score_and_build(run: RUN, folder: Path) -> None:
    cache = ["--cache", str(folder / "cache")]
    answers = ["--responses", str(folder / "answers.jsonl")]
    output = ["--output", str(folder / "scored.jsonl")]
    assert run("score", *answers, "--reward", '["chair"]', *output, *cache)[0] == 0
    code, out = build(run, folder, [{"name": "chair"}], *cache)
    assert (code, "chair: 6 answers scored, 6 scores from the cache" in out) == (0, True)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "x"}, "line 7: there is no response; there are prompt"),
    ({"response": "x"}, "line 7: there is no prompt"),
    ({"prompt": " ", "response": "x"}, "line 7: the prompt is empty"),
    ({"prompt": "x", "response": 3}, "line 7: response is a int, not a text"),
    ({"prompt": "x", "response": "y", "image": "no.png"}, "no.png does not exist"),
    ({"prompt": "x", "response": "y", "image": "/etc/hostname"}, "absolute"),
    ({"prompt": "x", "response": "y", "image": "../a.png"}, "'..' is not allowed"),
    ({"prompt": "x", "response": "y", "image": "answers.jsonl"}, "not an image"),
    ({"prompt": "x", "response": "y", "image": 3}, "an image cell is a int"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_rows(row: dict[str, Any], message: str, run: RUN, folder: Path) -> None:
    write(folder / "answers.jsonl", [*ROWS, row])
    code, error = build(run, folder, [{"name": "chair"}])
    assert (code, message in error, error.count("\n")) == (2, True, 1), error
    code, out = build(run, folder, [{"name": "chair"}], "--on_bad_row", "skip")
    assert (code, "1 bad rows skipped" in out) == (0, True)
    assert len(sides(folder)) == 2


def test_a_row_that_a_reward_cannot_score_is_named(run: RUN, folder: Path) -> None:
    rows = [ROWS[0], {k: v for k, v in ROWS[1].items() if k != "objects"}]
    write(folder / "answers.jsonl", rows)
    code, error = build(run, folder, [{"name": "chair"}])
    assert code == 2
    assert "reward chair failed for" in error
    assert "answers.jsonl line 2: nothing says what is in image a.png" in error


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("brightness", "scores images, not answers"),
        ("chiar", "did you mean 'chair'"),
    ],
)
def test_other_rewards(reward: str, message: str, run: RUN, folder: Path) -> None:
    code, error = build(run, folder, [{"name": reward}])
    assert (code, message in error) == (2, True)


def test_pairs_of_scored_answers_train(run: RUN, folder: Path, vlm: Callable[[str], Path]) -> None:
    assert build(run, folder, [{"name": "chair"}])[0] == 0
    code, out = run(
        *("train", "vlm-dpo", "--model", str(vlm("llava")), "--device", "cpu", "--offline", "true"),
        *("--pairs.path", str(folder / "out" / "pairs.jsonl"), "--lora.rank", "2"),
        *("--max_steps", "2", "--learning_rate", "0.001", "--per_device_train_batch_size", "2"),
        *("--output_dir", str(folder / "run")),
    )
    assert code == 0, out
    lines = read(folder / "run" / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert lines[1]["rewards/margin"] > 0
