from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmalign.config import PairsConfig
from mmalign.data.readers import PairTable, read_pairs
from mmalign.types import ImageRef, InputError

Png = Callable[..., bytes]


def read(path: Path, **options: Any) -> PairTable:
    return read_pairs(PairsConfig(path=str(path), **options))


def add(archive: tarfile.TarFile, name: str, data: bytes, **attributes: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in attributes.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(data))


def sample(archive: tarfile.TarFile, key: str, png: Png, number: int, **fields: Any) -> None:
    row = {"prompt": f"prompt {number}", **fields}
    add(archive, f"{key}.json", json.dumps(row).encode())
    add(archive, f"{key}.chosen.png", png(2 * number))
    add(archive, f"{key}.rejected.jpg", png(2 * number + 1, format="JPEG"))


def problems(table: PairTable) -> dict[str, str]:
    return {bad.where.rpartition(" ")[2]: bad.problem for bad in table.bad_rows}


def test_samples(tmp_path: Path, png: Png) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        sample(archive, "x/000", png, 0, score_chosen=2.0, score_rejected=1.0, pair_id="p")
        add(archive, "x/001.txt", "\ufeffzwei Bälle\n".encode())
        add(archive, "x/001.rejected.png", png(3))
        add(archive, "x/001.chosen.PNG", png(2))
    pairs = read(tmp_path / "a.tar").pairs
    assert [pair.prompt for pair in pairs] == ["prompt 0", "zwei Bälle"]
    assert (pairs[0].margin, pairs[0].pair_id) == (1.0, "p")
    for pair, number in ((pairs[1], 2), (pairs[0], 0)):
        assert isinstance(pair.chosen, ImageRef)
        assert pair.chosen.data == png(number)
    assert pickle.loads(pickle.dumps(pairs))[1].rejected == pairs[1].rejected


def test_folder_of_shards(tmp_path: Path, png: Png) -> None:
    for number in range(3):
        with tarfile.open(tmp_path / f"shard-{number}.tar", "w") as archive:
            sample(archive, "0", png, number)
    assert [pair.prompt for pair in read(tmp_path).pairs] == ["prompt 0", "prompt 1", "prompt 2"]
    assert len(read(tmp_path / "shard-[01].tar").pairs) == 2
    assert len(read(tmp_path / "shard-{1..2}.tar").pairs) == 2
    with pytest.raises(InputError, match=r"no file matches .*shard-3\.tar"):
        read(tmp_path / "shard-{1..3}.tar")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("target", ["/etc/hostname", "../../secret", "good.chosen.png"])
def test_link_members_are_refused(tmp_path: Path, png: Png, kind: bytes, target: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        sample(archive, "good", png, 0)
        add(archive, "bad.json", b'{"prompt": "x"}')
        add(archive, "bad.chosen.png", b"", type=kind, linkname=target)
        add(archive, "bad.rejected.png", png(9))
    table = read(tmp_path / "a.tar", on_bad_row="skip")
    assert [pair.prompt for pair in table.pairs] == ["prompt 0"]
    assert problems(table) == {"bad": "member 'bad.chosen.png' is a link: links are refused"}
    with pytest.raises(InputError, match=r"a\.tar sample bad: .*links are refused"):
        read(tmp_path / "a.tar")


@pytest.mark.parametrize("prefix", ["../", "/tmp/", "a/../../", "..\\", "C:\\"])
def test_member_names_that_leave_are_refused(tmp_path: Path, png: Png, prefix: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        sample(archive, f"{prefix}bad", png, 0)
        sample(archive, "good", png, 1)
    before = sorted(tmp_path.rglob("*"))
    table = read(tmp_path / "a.tar", on_bad_row="skip")
    assert [pair.prompt for pair in table.pairs] == ["prompt 1"]
    assert len(table.bad_rows) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_device_member_is_refused(tmp_path: Path, png: Png) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "bad.chosen.png", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
    table = read(tmp_path / "a.tar", on_bad_row="skip")
    assert "is not a regular file" in problems(table)["bad"]


def test_incomplete_samples(tmp_path: Path, png: Png) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "noprompt.chosen.png", png(0))
        add(archive, "noprompt.rejected.png", png(1))
        add(archive, "noimage.json", b'{"prompt": "x"}')
        add(archive, "noimage.chosen.png", png(2))
        add(archive, "two.chosen.png", png(3))
        add(archive, "two.chosen.jpg", png(4))
        add(archive, "twice.json", b"{}")
        add(archive, "twice.json", b"{}")
        add(archive, "broken.json", b"{")
        add(archive, "broken.chosen.png", png(5))
        add(archive, "broken.rejected.png", png(6))
        add(archive, "text.json", b'{"prompt": "x"}')
        add(archive, "text.chosen.png", b"text")
        add(archive, "text.rejected.png", png(7))
    found = problems(read(tmp_path / "a.tar", on_bad_row="skip"))
    assert "no .json or .txt" in found["noprompt"]
    assert "no rejected image" in found["noimage"]
    assert "2 chosen images" in found["two"]
    assert "occurs twice" in found["twice"]
    assert "broken.json is not JSON" in found["broken"]
    assert "chosen: not an image" in found["text"]


def test_truncated_shard_keeps_what_came_before(tmp_path: Path, png: Png) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        sample(archive, "0", png, 0)
        sample(archive, "1", png, 1)
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:4500])
    table = read(tmp_path / "a.tar", on_bad_row="skip")
    assert [pair.prompt for pair in table.pairs] == ["prompt 0"]
    assert table.bad_rows
    with pytest.raises(InputError, match=r"a\.tar"):
        read(tmp_path / "a.tar")


def test_not_a_tar(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * 1000)
    with pytest.raises(InputError, match=r"a\.tar: the tar file is broken"):
        read(tmp_path / "a.tar")


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz"])
def test_compressed_is_refused(tmp_path: Path, name: str, png: Png) -> None:
    with tarfile.open(tmp_path / name, "w:gz") as archive:
        sample(archive, "0", png, 0)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(InputError, match="is compressed: unpack it"):
            read(path)
