"""Which pictures `mmalign pairs label` shows, what it refuses, and that what it exports trains."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmalign import cli
from mmalign.config import (
    DiffusionDpoConfig,
    LoraConfig,
    PairsConfig,
    PairsLabelConfig,
)
from mmalign.data.files import write_jsonl
from mmalign.data.labels import LabelGroup, Labels
from mmalign.data.readers import read_pairs
from mmalign.data.schema import content_hash
from mmalign.pipelines import diffusion_dpo
from mmalign.pipelines._label_folder import list_groups

PROMPTS = ["red", "a red", "red <b>&amp;</b>"]


def paint(path: Path, *color: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), color).save(path)


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*argv: object) -> str:
        assert cli.main(["pairs", "label", *map(str, argv)]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        return err

    return run


def test_unusable_folders(folder: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red\na red\n")
    assert "images: is required" in fails()
    assert "no such file or folder" in fails(tmp_path / "absent")
    assert "is not a folder" in fails(prompts)
    assert "give --prompts FILE" in fails(empty)
    assert "has no images" in fails(empty, "--prompts", prompts)
    assert "no such file" in fails(folder, "--prompts", tmp_path / "absent.txt")
    (folder / "metadata.jsonl").unlink()
    assert "has 6 images but" in fails(folder, "--prompts", prompts)
    for file in sorted(folder.glob("*.png"))[2:]:
        file.unlink()
    line = fails(folder, "--prompts", prompts)
    assert "fewer than two different images of the prompt 'red'" in line
    line = fails(folder, "--prompts", prompts, "--on_bad_row", "skip")
    assert line.splitlines()[-1].endswith("has no prompt with two different images to compare")
    assert not list(folder.glob("labels*"))


def test_unusable_options(folder: Path, fails: Callable[..., str]) -> None:
    assert "nobody has judged" in fails(folder, "--export", folder / "out")
    assert "token: must not be empty" in fails(folder, "--token", "")
    assert "port: must be between" in fails(folder, "--port", "70000")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = fails(folder, "--port", taken.getsockname()[1])
    assert "choose another --host or --port" in line
    assert "no pair has a majority" in fails(folder, "--export", folder / "out")


@pytest.mark.parametrize("name", ["labels.sqlite", "labels.sqlite-wal"])
def test_a_database_that_is_a_link(
    folder: Path, tmp_path: Path, fails: Callable[..., str], name: str
) -> None:
    """It would be written wherever a stranger's folder says."""
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert f"{name} is a link" in fails(folder, "--port", "0")
    assert not (tmp_path / "elsewhere").exists()


def groups(folder: Path, **options: Any) -> list[LabelGroup]:
    found = list_groups(PairsLabelConfig(images=str(folder), **options))
    assert found is not None
    return found


def names(found: list[LabelGroup]) -> list[tuple[str, list[str]]]:
    return [(group.prompt, [image.path for image in group.images]) for group in found]


def test_folders_that_say_what_they_have(folder: Path, tmp_path: Path) -> None:
    pictures = [(p, [f"{n}-0.png", f"{n}-1.png"]) for n, p in enumerate(PROMPTS)]
    assert names(groups(folder)) == pictures
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red\nred\n")  # chooses among the folder's prompts, in this order
    assert names(groups(folder, prompts=str(prompts))) == [pictures[1], pictures[0]]
    pair = {"prompt": "p", "chosen_file_name": "0-0.png", "rejected_file_name": "1-0.png"}
    write_jsonl(folder / "metadata.jsonl", [pair])
    assert names(groups(folder)) == [("p", ["0-0.png", "1-0.png"])]
    write_jsonl(
        folder / "scores.jsonl", [{"file_name": f"{n}-0.png", "prompt": "s"} for n in range(3)]
    )
    assert names(groups(folder)) == [("s", ["0-0.png", "1-0.png", "2-0.png"])]


def test_candidates_of_an_unfinished_build(tmp_path: Path) -> None:
    for prompt in ("red", "a red"):
        label = content_hash(prompt.encode()).hex()
        for index in range(2):
            paint(tmp_path / "candidates" / label / f"{index:03d}.png", len(prompt), index, 0)
    (tmp_path / "prompts.txt").write_text("red\na red\n")
    found = groups(tmp_path, prompts=str(tmp_path / "prompts.txt"))
    assert [(group.prompt, len(group.images)) for group in found] == [("red", 2), ("a red", 2)]


def test_pictures_outside_the_folder_are_refused(folder: Path, fails: Callable[..., str]) -> None:
    paint(folder.parent / "secret.png", 9, 9, 9)
    (folder / "0-0.png").unlink()
    (folder / "0-0.png").symlink_to(folder.parent / "secret.png")
    assert "is a link out of" in fails(folder)
    write_jsonl(folder / "metadata.jsonl", [{"file_name": "../secret.png", "prompt": "x"}])
    assert "'..' is not allowed" in fails(folder)


def test_same_picture_and_unreadable_picture(
    folder: Path, fails: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(folder / "0-0.png", folder / "0-1.png")
    assert "fewer than two different images of the prompt 'red'" in fails(folder)
    (folder / "1-1.png").write_bytes(b"text")
    found = groups(folder, on_bad_row="skip")
    assert [group.prompt for group in found] == PROMPTS[2:]
    assert "1-1.png: not an image" in caplog.text


def judged(folder: Path) -> Path:
    """Two of three people prefer the greener picture of two prompts; the third is a tie."""
    labels = Labels(folder / "labels.sqlite")
    labels.add(groups(folder))
    green = {content_hash(f.read_bytes()).hex() for f in folder.glob("*-1.png")}
    for number, annotator in enumerate(("ann", "bob", "cy")):
        while shown := labels.next_pairs(annotator, 1):
            (pair,) = shown
            right = pair.left if (pair.left in green) == (number < 2) else pair.right
            labels.judge(annotator, pair.key, None if pair.prompt == PROMPTS[2] else right)
    labels.close()
    return folder


@pytest.mark.parametrize("name", ["pairs", "pairs.parquet", "pairs.tar"])
def test_export(
    folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / name
    assert cli.main(["pairs", "label", str(judged(folder)), "--export", str(target)]) == 0
    out = capsys.readouterr().out
    assert f"2 pairs in {target}; 1 ties and 0 pairs without their images left out; " in out
    assert "people agree on 33% of 3 pairs judged by several, Fleiss' kappa" in out
    table = read_pairs(PairsConfig(path=str(target)))
    assert {pair.prompt for pair in table.pairs} == set(PROMPTS[:2])
    for pair in table.pairs:
        assert (pair.source, pair.score_chosen, pair.score_rejected) == ("people", 2 / 3, 1 / 3)
        if name == "pairs":
            number = PROMPTS.index(pair.prompt)
            assert isinstance(pair.chosen, tuple)
            assert isinstance(pair.chosen.data, Path)
            assert pair.chosen.data.read_bytes() == (folder / f"{number}-1.png").read_bytes()
    if name == "pairs":
        row = json.loads((target / "metadata.jsonl").read_text().splitlines()[0])
        assert row["chosen_file_name"].startswith("images/")
        assert cli.main(["pairs", "validate", "--path", str(target)]) == 0


def test_export_leaves_out_what_has_changed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judged(folder)
    os.remove(folder / "0-0.png")
    cli.main(["pairs", "label", str(folder), "--export", str(tmp_path / "out")])
    assert "1 pairs in" in (out := capsys.readouterr().out)
    assert "1 pairs without their images left out" in out


def test_exported_pairs_train(folder: Path, tiny_sd: Path, tmp_path: Path) -> None:
    cli.main(["pairs", "label", str(judged(folder)), "--export", str(tmp_path / "pairs")])
    config = DiffusionDpoConfig(
        model=str(tiny_sd),
        output_dir=str(tmp_path / "run"),
        device="cpu",
        offline=True,
        lora=LoraConfig(rank=2),
        pairs=PairsConfig(path=str(tmp_path / "pairs"), resolution=16),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
    )
    diffusion_dpo.run(config)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert json.loads(lines[-1])["grad_norm"] > 0
