from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mmalign.config import ScoreConfig
from mmalign.pipelines.score import run
from mmalign.types import InputError

LEVELS = [0, 51, 255]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three gray images of two sizes, and their prompts."""
    images = tmp_path / "images"
    images.mkdir()
    for index, level in enumerate(LEVELS):
        Image.new("RGB", (8 + 4 * (index == 1), 6), (level,) * 3).save(images / f"{index}.png")
    (tmp_path / "prompts.txt").write_text("black\ndark\nwhite\n", encoding="utf-8")
    return tmp_path


def config(folder: Path, **changes: Any) -> ScoreConfig:
    options: dict[str, Any] = {
        "reward": ["brightness"],
        "images": str(folder / "images"),
        "prompts": str(folder / "prompts.txt"),
        "output": str(folder / "out" / "scores.parquet"),
    }
    return ScoreConfig(**(options | changes))


def table(folder: Path) -> dict[str, list[Any]]:
    content: dict[str, list[Any]] = pq.read_table(folder / "out" / "scores.parquet").to_pydict()
    return content


def name_jsonl(folder: Path, *records: dict[str, Any]) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_scores_in_order_at_the_images_own_size(folder: Path, capfd: Any) -> None:
    run(config(folder, reward=["brightness", "jpeg"], batch_size=2))
    content = table(folder)
    assert list(content) == ["file_name", "prompt", "brightness", "jpeg"]
    assert content["file_name"] == ["0.png", "1.png", "2.png"]
    assert content["prompt"] == ["black", "dark", "white"]
    assert content["brightness"] == pytest.approx([0.0, 0.2, 1.0], abs=1e-6)
    out = "".join(capfd.readouterr())
    assert "p90" in out
    assert "brightness" in out
    assert "3 images scored, 0 skipped" in out


def test_summary_numbers(folder: Path, capfd: Any) -> None:
    run(config(folder))
    (line,) = [x for x in capfd.readouterr().out.splitlines() if x.startswith("brightness")]
    values = [0.0, 0.2, 1.0]
    expected = [np.mean(values), 0.0, *np.percentile(values, [10, 50, 90]), 1.0]
    assert [float(cell) for cell in line.split()[1:]] == pytest.approx(expected, rel=1e-3)


def test_jsonl_names_the_images(folder: Path) -> None:
    prompts = name_jsonl(
        folder, {"file_name": "2.png", "prompt": "w"}, {"file_name": "0.png", "prompt": "b"}
    )
    run(config(folder, prompts=prompts))
    assert table(folder)["brightness"] == pytest.approx([1.0, 0.0])


def test_a_folder_may_have_its_own_prompts(folder: Path) -> None:
    written = name_jsonl(folder, {"file_name": "2.png", "prompt": "w"})
    Path(written).rename(folder / "images" / "metadata.jsonl")
    run(config(folder, prompts=None))
    assert table(folder)["prompt"] == ["w"]
    (folder / "images" / "metadata.jsonl").unlink()
    with pytest.raises(InputError, match=r"prompts: is required, .* without metadata\.jsonl"):
        run(config(folder, prompts=None))


def test_scores_as_json_lines(folder: Path) -> None:
    output = folder / "scores.jsonl"
    run(config(folder, output=str(output)))
    rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [list(row) for row in rows] == [["file_name", "prompt", "brightness"]] * 3
    assert [row["brightness"] for row in rows] == pytest.approx([0.0, 0.2, 1.0], abs=1e-6)


def test_options_reach_the_reward(folder: Path) -> None:
    run(config(folder, reward=["jpeg"], options={"jpeg": {"direction": "incompressibility"}}))
    assert min(table(folder)["jpeg"]) > 0
    with pytest.raises(InputError, match="options are for reward 'clip'"):
        run(config(folder, options={"clip": {}}))


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n cut"])
def test_unreadable_image_stops(folder: Path, content: bytes) -> None:
    (folder / "images" / "1.png").write_bytes(content)
    with pytest.raises(InputError, match=r"1\.png"):
        run(config(folder))
    assert not (folder / "out").exists()


def test_unreadable_image_is_skipped_and_counted(
    folder: Path, capfd: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "images" / "1.png").write_bytes(b"not an image")
    with caplog.at_level(logging.WARNING):
        run(config(folder, on_bad_row="skip"))
    assert table(folder)["file_name"] == ["0.png", "2.png"]
    assert "2 images scored, 1 skipped" in "".join(capfd.readouterr())
    assert "1.png" in caplog.text


def test_all_images_unreadable(folder: Path) -> None:
    for index in range(3):
        (folder / "images" / f"{index}.png").write_bytes(b"")
    with pytest.raises(InputError, match="none of the 3 images"):
        run(config(folder, on_bad_row="skip"))


def test_too_large_image(folder: Path) -> None:
    with pytest.raises(InputError, match=r"[01]\.png"):
        run(config(folder, max_pixels=47))


def test_counts_must_agree(folder: Path) -> None:
    (folder / "prompts.txt").write_text("one\ntwo\n")
    with pytest.raises(InputError, match=r"3 images but .* has 2 prompts"):
        run(config(folder))


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_nan_from_a_reward_always_stops(folder: Path, policy: Any) -> None:
    with pytest.raises(InputError, match=r"math:log.* for 0\.png"):
        run(config(folder, reward=["math:log"], on_bad_row=policy))


def test_missing_folder_and_reward(folder: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        run(config(folder, images=str(folder / "nowhere")))
    with pytest.raises(InputError, match="did you mean 'brightness'"):
        run(config(folder, reward=["brightnes"]))
    with pytest.raises(InputError, match="no reward given"):
        run(config(folder, reward=[]))


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "link.png"])
def test_paths_out_of_the_folder(folder: Path, name: str) -> None:
    Image.new("RGB", (4, 4)).save(folder / "secret.png")
    (folder / "images" / "link.png").symlink_to(folder / "secret.png")
    prompts = name_jsonl(folder, {"file_name": name, "prompt": "x"})
    with pytest.raises(InputError, match=r"prompts\.jsonl line 1: .*(leaves|absolute|link out)"):
        run(config(folder, prompts=prompts))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 1: the line is not JSON"),
        ('{"prompt": "x"}', "line 1: 'None' is not a file name"),
        ('{"file_name": "nowhere.png", "prompt": "x"}', r"line 1: .*nowhere\.png does not exist"),
        ('{"file_name": "0.png"}', "line 1: .*prompt"),
        ('{"file_name": "0.png", "prompt": 3}', "line 1: "),
        ('{"file_name": "0.png", "prompt": "  "}', "line 1: .*prompt"),
        ("[1]", "line 1: "),
        ("", "is empty"),
    ],
)
def test_bad_lines(folder: Path, line: str, message: str) -> None:
    path = folder / "prompts.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=message):
        run(config(folder, prompts=str(path)))


def test_byte_order_mark(folder: Path) -> None:
    path = folder / "prompts.jsonl"
    path.write_text('{"file_name": "0.png", "prompt": "x"}\n', encoding="utf-8-sig")
    run(config(folder, prompts=str(path)))
    assert table(folder)["prompt"] == ["x"]


def test_output_that_cannot_be_written(folder: Path) -> None:
    (folder / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        run(config(folder, output=str(folder / "file" / "scores.parquet")))


calls: list[int] = []


def counted(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    calls.append(len(images))
    return images.mean((1, 2, 3))


def test_cache_scores_each_picture_once(folder: Path, capfd: Any) -> None:
    calls.clear()
    options = {"reward": [f"{__name__}:counted"], "cache": str(folder / "cache"), "batch_size": 1}
    run(config(folder, **options))
    first = table(folder)
    assert calls == [1, 1, 1]
    run(config(folder, **options))
    assert (table(folder), len(calls)) == (first, 3)
    assert "3 images scored, 0 skipped, 3 scores from the cache" in "".join(capfd.readouterr())
    Image.new("RGB", (8, 6), (9, 9, 9)).save(folder / "images" / "2.png")
    (folder / "prompts.txt").write_text("black\nanother\nwhite\n", encoding="utf-8")
    run(config(folder, **options))
    assert len(calls) == 5


def test_what_was_scored_before_a_fault_is_kept(folder: Path) -> None:
    calls.clear()
    (folder / "images" / "2.png").write_bytes(b"not an image")
    options = {"reward": [f"{__name__}:counted"], "cache": str(folder / "cache"), "batch_size": 1}
    with pytest.raises(InputError, match=r"2\.png"):
        run(config(folder, **options))
    done = len(calls)
    assert done >= 1
    run(config(folder, **options, on_bad_row="skip"))
    assert len(calls) == 2


def test_out_of_memory_halves_the_batch(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def hungry(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return images.mean((1, 2, 3))

    monkeypatch.setattr(sys.modules[__name__], "counted", hungry)
    Image.new("RGB", (8, 6), (51, 51, 51)).save(folder / "images" / "1.png")
    with caplog.at_level(logging.WARNING):
        run(config(folder, reward=[f"{__name__}:counted"]))
    assert table(folder)[f"{__name__}:counted"] == pytest.approx([0.0, 0.2, 1.0], abs=1e-6)
    assert "out of memory with 3 samples at a time; going on with 1" in caplog.text
