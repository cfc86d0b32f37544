from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmalign.config import PairsConfig
from mmalign.data.images import open_image
from mmalign.data.readers import LazyPairs, PairTable, describe, read_pairs
from mmalign.types import ImageRef, InputError

Make = Callable[..., Path]


def skip(path: Path, **options: Any) -> PairTable:
    return read_pairs(PairsConfig(path=str(path), on_bad_row="skip", **options))


def stop(path: Path, **options: Any) -> PairTable:
    return read_pairs(PairsConfig(path=str(path), **options))


def check_both_policies(path: Path, problem: str, row: int = 2, good: int = 2) -> None:
    with pytest.raises(InputError, match=f"line {row}: .*{problem}"):
        stop(path)
    table = skip(path)
    assert len(table.pairs) == good
    assert [bad.where.rpartition(" ")[2] for bad in table.bad_rows] == [str(row)]
    assert table.ties == 0


def test_good_rows(imagefolder: Make, png: Callable[[int], bytes]) -> None:
    folder = imagefolder(row1={"score_chosen": 2, "score_rejected": 0.5, "source": "me"})
    table = stop(folder)
    assert isinstance(table.pairs, LazyPairs)
    assert [pair.prompt for pair in table.pairs] == ["prompt 0", "prompt 1", "prompt 2"]
    pair = table.pairs[1]
    assert (pair.score_chosen, pair.score_rejected, pair.margin, pair.source) == (2, 0.5, 1.5, "me")
    assert isinstance(pair.chosen, ImageRef)
    assert isinstance(pair.chosen.data, Path)
    assert pair.chosen.data.read_bytes() == png(2)
    assert "metadata.jsonl line 2, chosen" in pair.chosen.where
    assert open_image(pair.chosen, max_pixels=1000).size == (12, 10)
    assert table.pairs[0].margin is None
    assert (table.bad_rows, table.ties) == ([], 0)


def test_metadata_file_instead_of_folder_and_limit(imagefolder: Make) -> None:
    table = stop(imagefolder() / "metadata.jsonl", limit=2)
    assert len(table.pairs) == 2
    assert [pair.prompt for pair in table.pairs[1:]] == ["prompt 1"]
    assert table.pairs[-1].prompt == "prompt 1"


def test_pair_id_depends_on_content_only(imagefolder: Make, tmp_path: Path) -> None:
    folder = imagefolder()
    before = [pair.pair_id for pair in stop(folder).pairs]
    moved = shutil.copytree(folder, tmp_path / "moved")
    lines = (moved / "metadata.jsonl").read_text().splitlines()
    (moved / "metadata.jsonl").write_text("\n".join(reversed(lines)))
    assert [pair.pair_id for pair in stop(moved).pairs] == before[::-1]
    assert len(set(before)) == 3
    row = {**json.loads(lines[0]), "prompt": "another"}
    (moved / "metadata.jsonl").write_text(json.dumps(row))
    assert stop(moved).pairs[0].pair_id not in before


def test_pair_id_of_the_file_is_kept(imagefolder: Make) -> None:
    assert stop(imagefolder(row0={"pair_id": "mine"})).pairs[0].pair_id == "mine"


def test_missing_column_names_the_nearest(imagefolder: Make) -> None:
    folder = imagefolder(row1={"prompt": "DROP", "promt": "x"})
    check_both_policies(folder, "'prompt' is missing; the nearest present is 'promt'")


def test_empty_prompt(imagefolder: Make) -> None:
    check_both_policies(imagefolder(row1={"prompt": "  "}), "the prompt is empty")


def test_prompt_that_is_no_text(imagefolder: Make) -> None:
    check_both_policies(imagefolder(row1={"prompt": ["a"]}), "the prompt is a list")


def test_same_image_twice(imagefolder: Make) -> None:
    folder = imagefolder()
    shutil.copy(folder / "1_0.png", folder / "1_1.png")
    check_both_policies(folder, "chosen and rejected are the same image")


def test_duplicate_pair(imagefolder: Make) -> None:
    again = {
        "prompt": "prompt 0",
        "chosen_file_name": "0_0.png",
        "rejected_file_name": "0_1.png",
    }
    check_both_policies(imagefolder(row2=again), "the same pair as .* line 1", row=3)


def test_same_images_for_another_prompt_or_order_are_no_duplicate(imagefolder: Make) -> None:
    swapped = {
        "prompt": "prompt 0",
        "chosen_file_name": "0_1.png",
        "rejected_file_name": "0_0.png",
    }
    other = {"chosen_file_name": "0_0.png", "rejected_file_name": "0_1.png"}
    assert len(stop(imagefolder(row1=swapped, row2=other)).pairs) == 3


def test_duplicate_pair_id(imagefolder: Make) -> None:
    folder = imagefolder(row0={"pair_id": "a"}, row1={"pair_id": "a"})
    check_both_policies(folder, "pair_id 'a' is also that of .* line 1")


def test_missing_file(imagefolder: Make) -> None:
    folder = imagefolder()
    (folder / "1_1.png").unlink()
    check_both_policies(folder, r"1_1\.png does not exist")


def test_broken_json_line(imagefolder: Make) -> None:
    check_both_policies(
        imagefolder(row1='{"prompt": "x", '), "the line is not JSON, from column 16: "
    )


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "\\\\host\\share\\a.png"])
def test_names_that_leave_the_folder(imagefolder: Make, name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    folder = imagefolder(row1={"chosen_file_name": name})
    check_both_policies(folder, "leaves|is absolute")


def test_symlink_out_of_the_folder(
    imagefolder: Make, tmp_path: Path, png: Callable[[int], bytes]
) -> None:
    folder = imagefolder()
    (tmp_path / "secret.png").write_bytes(png(99))
    (folder / "1_0.png").unlink()
    (folder / "1_0.png").symlink_to(tmp_path / "secret.png")
    check_both_policies(folder, "is a link out of")


@pytest.mark.parametrize("content", [b"", b"plain text", b"\x89PNG\r\n\x1a\n\0\0"])
def test_bad_image_header(imagefolder: Make, content: bytes) -> None:
    folder = imagefolder()
    (folder / "1_1.png").write_bytes(content)
    check_both_policies(folder, "rejected: .*(empty|format|header)")


def test_too_large_image(imagefolder: Make) -> None:
    folder = imagefolder()
    with pytest.raises(InputError, match="12 x 10 pixels, more than max_pixels 100"):
        stop(folder, max_pixels=100)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", '"high"', "true", "9" * 5000])
def test_scores_that_are_no_numbers(imagefolder: Make, value: str) -> None:
    folder = imagefolder()
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    lines[1] = lines[1].replace("{", '{"score_chosen": ' + value + ", ", 1)
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    check_both_policies(folder, "not a (finite )?number|not usable JSON")


def test_margin_that_contradicts_the_scores(imagefolder: Make) -> None:
    change = {"score_chosen": 2, "score_rejected": 1, "margin": 5}
    check_both_policies(imagefolder(row1=change), "margin 5 is not .* = 1")


def test_ties_are_dropped_and_counted(imagefolder: Make) -> None:
    equal = {"score_chosen": 1.0, "score_rejected": 1.0}
    table = stop(imagefolder(row0=equal, row2={"margin": 0}))
    assert [pair.prompt for pair in table.pairs] == ["prompt 1"]
    assert (table.ties, table.bad_rows) == (2, [])


def test_byte_order_mark(imagefolder: Make) -> None:
    file = imagefolder() / "metadata.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(stop(file).pairs) == 3


def test_utf16(imagefolder: Make) -> None:
    file = imagefolder() / "metadata.jsonl"
    file.write_text(file.read_text(), encoding="utf-16")
    with pytest.raises(InputError, match=r"metadata\.jsonl is UTF-16"):
        skip(file)


def test_skipped_rows_give_one_warning(imagefolder: Make, caplog: pytest.LogCaptureFixture) -> None:
    table = skip(imagefolder(row0={"prompt": ""}, row1="nonsense"))
    assert table.bad_rows[0].problem == "the prompt is empty"
    assert len(caplog.records) == 1
    assert "2 bad rows skipped" in caplog.text
    assert "metadata.jsonl line 2: the line is not JSON" in caplog.text


def test_no_rows_and_bad_limit(tmp_path: Path, imagefolder: Make) -> None:
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(InputError, match="has no rows"):
        stop(tmp_path / "metadata.jsonl")
    with pytest.raises(InputError, match="limit"):
        stop(imagefolder(), limit=0)


def test_describe_does_not_read_lazy_images(imagefolder: Make) -> None:
    folder = imagefolder()
    pairs = stop(folder).pairs
    copies = list(pairs)
    plain = describe(copies)
    shutil.rmtree(folder)
    assert describe(pairs) == plain
    with pytest.raises(InputError, match=r"line 1, chosen: 0_0\.png: the file does not exist"):
        describe(copies)


def test_table_survives_pickling(imagefolder: Make) -> None:
    pairs = stop(imagefolder()).pairs
    assert list(pickle.loads(pickle.dumps(pairs))) == list(pairs)


def test_pipe_in_the_folder_is_not_opened(imagefolder: Make) -> None:
    folder = imagefolder()
    (folder / "1_0.png").unlink()
    os.mkfifo(folder / "1_0.png")
    check_both_policies(folder, "not a regular file")
