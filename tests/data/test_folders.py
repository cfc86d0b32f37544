from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmalign.config import PairsConfig
from mmalign.data.images import open_image
from mmalign.data.readers import PairTable, read_pairs
from mmalign.types import ImageRef, InputError

Png = Callable[..., bytes]


def read(path: Path, **options: Any) -> PairTable:
    return read_pairs(PairsConfig(path=str(path), **options))


def sides(table: PairTable) -> list[tuple[str, str, str]]:
    return [(p.prompt, name(p.chosen), name(p.rejected)) for p in table.pairs]


def name(side: object) -> str:
    assert isinstance(side, ImageRef)
    assert isinstance(side.data, Path)
    return f"{side.data.parent.name}/{side.data.name}"


@pytest.fixture
def win_lose(tmp_path: Path, png: Png) -> Callable[..., Path]:
    def make(winners: str = "w", losers: str = "l", stems: str = "ab") -> Path:
        root = tmp_path / "data"
        for side, folder in enumerate((winners, losers)):
            (root / folder).mkdir(parents=True)
            for number, stem in enumerate(stems):
                (root / folder / f"{stem}.png").write_bytes(png(2 * number + side))
        return root

    return make


@pytest.mark.parametrize("names", [("w", "l"), ("win", "lose"), ("chosen", "rejected")])
def test_win_lose_with_a_list_of_prompts(win_lose: Callable[..., Path], names: Any) -> None:
    root = win_lose(*names)
    (root / "prompts.txt").write_bytes("\ufeffone\r\ntwo\r\n".encode())
    win, lose = names
    assert sides(read(root)) == [
        ("one", f"{win}/a.png", f"{lose}/a.png"),
        ("two", f"{win}/b.png", f"{lose}/b.png"),
    ]


def test_win_lose_with_prompt_files(win_lose: Callable[..., Path]) -> None:
    root = win_lose()
    for stem in "ab":
        (root / "w" / f"{stem}.txt").write_text(f"prompt {stem}\n")
    assert [pair.prompt for pair in read(root).pairs] == ["prompt a", "prompt b"]
    (root / "w" / "b.txt").unlink()
    table = read(root, on_bad_row="skip")
    assert [pair.prompt for pair in table.pairs] == ["prompt a"]
    assert "b.txt does not exist" in table.bad_rows[0].problem


@pytest.mark.parametrize("table", ["prompts.jsonl", "metadata.jsonl"])
def test_win_lose_with_a_table(win_lose: Callable[..., Path], table: str) -> None:
    root = win_lose(stems="abc")
    rows = [
        {"file_name": "w/b.png", "prompt": "B", "score_chosen": 2, "score_rejected": 1},
        {"file_name": "a", "prompt": "A"},
    ]
    (root / table).write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=f"stem 'c': .*{table} has no prompt"):
        read(root)
    pairs = read(root, on_bad_row="skip").pairs
    assert [(pair.prompt, pair.margin) for pair in pairs] == [("A", None), ("B", 1.0)]


def test_win_lose_without_or_with_two_sources_of_prompts(win_lose: Callable[..., Path]) -> None:
    root = win_lose()
    with pytest.raises(InputError, match=r"needs one source of prompts: .*found none"):
        read(root)
    (root / "prompts.txt").write_text("one\ntwo")
    (root / "w" / "a.txt").write_text("one")
    with pytest.raises(InputError, match=r"found .*prompts\.txt, .*STEM\.txt"):
        read(root)


def test_win_lose_with_too_few_prompts(win_lose: Callable[..., Path]) -> None:
    root = win_lose()
    (root / "prompts.txt").write_text("one\n")
    with pytest.raises(InputError, match=r"prompts\.txt has 1 lines for 2 pairs"):
        read(root)


def test_win_lose_stems_without_partner_or_with_two(
    win_lose: Callable[..., Path], png: Png
) -> None:
    root = win_lose(stems="abc")
    (root / "prompts.txt").write_text("one\ntwo\nthree")
    (root / "l" / "a.png").unlink()
    (root / "w" / "b.jpg").write_bytes(png(50, format="JPEG"))
    table = read(root, on_bad_row="skip")
    assert [pair.prompt for pair in table.pairs] == ["three"]
    assert "l/ has no image a.png" in table.bad_rows[0].problem
    assert "w/ has 2 images of this stem: b.jpg, b.png" in table.bad_rows[1].problem


def test_win_lose_different_suffixes_and_ties(win_lose: Callable[..., Path], png: Png) -> None:
    root = win_lose()
    (root / "prompts.txt").write_text("one\ntwo")
    (root / "l" / "a.png").rename(root / "l" / "a.webp")
    (root / "tie").mkdir()
    for stem in "xyz":
        (root / "tie" / f"{stem}.png").write_bytes(png(60))
    table = read(root)
    assert (len(table.pairs), table.ties) == (2, 3)


def test_win_lose_linked_folder_out_of_the_root(
    win_lose: Callable[..., Path], tmp_path: Path
) -> None:
    root = win_lose()
    (root / "prompts.txt").write_text("one\ntwo")
    (root / "l").rename(tmp_path / "outside")
    (root / "l").symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="is a link out of"):
        read(root, on_bad_row="skip")


def test_win_lose_linked_files_out_of_the_root(
    win_lose: Callable[..., Path], tmp_path: Path
) -> None:
    root = win_lose()
    (tmp_path / "secret").write_text("secret\nsecret")
    (root / "w" / "a.png").unlink()
    (root / "w" / "a.png").symlink_to(tmp_path / "secret")
    (root / "prompts.txt").write_text("one\ntwo")
    assert "is a link out of" in read(root, on_bad_row="skip").bad_rows[0].problem
    (root / "prompts.txt").unlink()
    (root / "prompts.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="is a link out of"):
        read(root, on_bad_row="skip")


def test_win_lose_of_photographs(tmp_path: Path, photos: dict[str, Image.Image]) -> None:
    for folder, names in (("w", ("astronaut", "chelsea")), ("l", ("coffee", "rocket"))):
        (tmp_path / folder).mkdir()
        for stem, title in zip("ab", names, strict=True):
            photos[title].save(tmp_path / folder / f"{stem}.png")
    (tmp_path / "prompts.txt").write_text("a person\na cat")
    first, second = read(tmp_path).pairs
    assert isinstance(first.rejected, ImageRef)
    assert isinstance(second.chosen, ImageRef)
    assert open_image(first.rejected, max_pixels=9999).tobytes() == photos["coffee"].tobytes()
    assert open_image(second.chosen, max_pixels=9999).tobytes() == photos["chelsea"].tobytes()


@pytest.fixture
def hpd(tmp_path: Path, png: Png) -> Callable[..., Path]:
    def make(split: str, records: object, folder: bool = True) -> Path:
        root = tmp_path / "HPD"
        images = root / split if folder else root
        images.mkdir(parents=True, exist_ok=True)
        for number in range(4):
            (images / f"{number}.png").write_bytes(png(number))
        (root / f"{split}.json").write_text(json.dumps(records))
        return root

    return make


@pytest.mark.parametrize("key", ["image_path", "file_path"])
@pytest.mark.parametrize("folder", [True, False])
def test_hpdv2_train(hpd: Callable[..., Path], key: str, folder: bool) -> None:
    records = [
        {"prompt": "one", key: ["0.png", "1.png"], "human_preference": [0, 1], "user_hash": "u"},
        {"prompt": "two", key: ["2.png", "3.png"], "human_preference": [1, 0], "user_hash": "u"},
        {"prompt": "tie", key: ["2.png", "3.png"], "human_preference": [0, 0], "user_hash": "u"},
    ]
    root = hpd("train", records, folder)
    table = read(root)
    base = "train" if folder else "HPD"
    assert sides(table) == [
        ("one", f"{base}/1.png", f"{base}/0.png"),
        ("two", f"{base}/2.png", f"{base}/3.png"),
    ]
    assert table.ties == 1
    assert len(read(root / "train.json").pairs) == 2


def test_hpdv2_test_ranks(hpd: Callable[..., Path]) -> None:
    record = {"prompt": "one", "image_path": ["0.png", "1.png", "2.png"], "rank": [2.5, 1, 2.5]}
    table = read(hpd("test", [record]))
    assert sides(table) == [
        ("one", "test/1.png", "test/0.png"),
        ("one", "test/1.png", "test/2.png"),
    ]
    assert table.ties == 1
    assert (table.pairs[0].score_chosen, table.pairs[0].margin) == (-1, 1.5)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"prompt": "x", "image_path": ["0.png"], "human_preference": [1]}, "there are 1 images"),
        ({"prompt": "x", "image_path": ["0.png", "1.png"]}, "'human_preference' is missing"),
        ({"prompt": "x", "image_path": "0.png", "human_preference": [1]}, "not a list"),
        ({"image_path": ["0.png", "1.png"], "human_preference": [1, 0]}, "'prompt' is missing"),
        (
            {"prompt": "x", "image_path": ["0.png", "1.png"], "human_preference": ["a", "b"]},
            "one number per image",
        ),
        (
            {"prompt": "x", "image_path": ["../0.png", "1.png"], "human_preference": [1, 0]},
            "'..' is not allowed",
        ),
        (
            {"prompt": "x", "image_path": ["9.png", "1.png"], "human_preference": [1, 0]},
            "does not exist",
        ),
        ("text", "the record is a str"),
    ],
)
def test_hpdv2_bad_records(hpd: Callable[..., Path], record: object, problem: str) -> None:
    with pytest.raises(InputError, match=f"record 1: .*{problem}"):
        read(hpd("train", [record]))


def test_hpdv2_bad_file(hpd: Callable[..., Path]) -> None:
    root = hpd("train", {"prompt": "x"})
    with pytest.raises(InputError, match="is not a JSON list"):
        read(root)
    (root / "train.json").write_text('[\n{"prompt": }\n]')
    with pytest.raises(InputError, match=r"train\.json line 2 is not JSON"):
        read(root)
    (root / "train.json").write_text("[]", encoding="utf-16")
    with pytest.raises(InputError, match="UTF-16"):
        read(root)
