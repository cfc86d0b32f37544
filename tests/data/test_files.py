from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mmalign.data.files import (
    atomic_path,
    clear_leftovers,
    matching_files,
    read_jsonl,
    read_text,
    resolve_inside,
    write_bytes,
)
from mmalign.data.schema import RowError
from mmalign.types import InputError


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "a/../../secret.png",
        "..\\secret.png",
        "/etc/hostname",
        "\\\\server\\share\\a.png",
        "//server/share/a.png",
        "C:\\a.png",
        "C:a.png",
        "file:///etc/hostname",
        "https://host/a.png",
        "",
        "a\0.png",
        None,
        7,
    ],
)
def test_names_that_leave_are_refused_before_anything_is_looked_up(
    name: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched(*_: object, **__: object) -> None:
        raise AssertionError("the file system was touched")

    for function in ("resolve", "is_file", "exists", "open"):
        monkeypatch.setattr(Path, function, touched)
    with pytest.raises(RowError, match=r"not a file name|absolute|leaves"):
        resolve_inside(tmp_path, name)


def test_symlinked_file_out_of_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    (root / "link.png").symlink_to("../secret.png")
    with pytest.raises(RowError, match="is a link out of"):
        resolve_inside(root, "link.png")


def test_symlinked_folder_out_of_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.png").write_bytes(b"x")
    (root / "images").symlink_to(tmp_path / "outside")
    with pytest.raises(RowError, match="is a link out of"):
        resolve_inside(root, "images/a.png")


def test_link_inside_the_root_and_linked_root_are_fine(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.png").write_bytes(b"x")
    (root / "b.png").symlink_to("a.png")
    (tmp_path / "alias").symlink_to(root)
    assert resolve_inside(tmp_path / "alias", "b.png") == (root / "a.png").resolve()


def test_link_loop(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to("b.png")
    (tmp_path / "b.png").symlink_to("a.png")
    with pytest.raises(RowError):
        resolve_inside(tmp_path, "a.png")


def test_missing_file_and_folder_as_file(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="does not exist"):
        resolve_inside(tmp_path, "no.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(RowError, match="not a regular file"):
        resolve_inside(tmp_path, "folder.png")


def test_jsonl_numbers_lines_and_keeps_going(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    deep = b"[" * 200_000
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": \n[1]\n\xff\xfe\x00\n' + deep + b'\n{"a": 2}')
    rows = list(read_jsonl(file))
    assert [number for number, _ in rows] == [1, 3, 4, 5, 6, 7]
    assert rows[0][1] == {"a": 1}
    assert rows[-1][1] == {"a": 2}
    problems = [str(row) for _, row in rows[1:5]]
    assert "not JSON" in problems[0]
    assert "not an object" in problems[1]
    assert "not UTF-8" in problems[2]
    assert "not usable JSON" in problems[3]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_utf16_is_named(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}', encoding=encoding)
    with pytest.raises(InputError, match=r"a\.jsonl is UTF-16 .* save it as UTF-8"):
        list(read_jsonl(file))


def test_text_in_another_encoding_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("one\nzwei Bücher".encode("latin-1"))
    with pytest.raises(InputError, match=r"a\.txt line 2 is not UTF-8"):
        read_text(file)


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    write_bytes(file, b"old")

    def interrupted() -> None:
        with atomic_path(file) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_leftovers_of_killed_writes_are_cleared(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    with atomic_path(tmp_path / "samples" / "a.png") as temporary:
        name = temporary.name
        temporary.touch()
    kept = ["a.tmp", ".a.tmp", ".a.png.1-zz.tmp"]
    for file in (*kept, name, f"samples/{name}"):
        (tmp_path / file).touch()
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "samples"])
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["a.png"]


def test_disk_full_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.bin"
    write_bytes(file, b"old")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"cannot write .*a\.bin: No space left on device"):
        write_bytes(file, b"new")
    monkeypatch.undo()
    assert file.read_bytes() == b"old"


def test_read_only_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", denied)  # a mode would not stop root
    with pytest.raises(InputError, match=r"cannot write .*a\.bin: Permission denied"):
        write_bytes(tmp_path / "folder" / "a.bin", b"new")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("train-{08..10}.tar", ["train-08", "train-09", "train-10"]),
        ("{train,val}-08.tar", ["train-08", "val-08"]),
        ("{train,val}-{08..09}.tar", ["train-08", "train-09", "val-08", "val-09"]),
        ("{*,train}-08.tar", ["train-08", "val-08"]),
        ("{train}-*.tar", []),
        ("train-{09..08}.tar", []),
    ],
)
def test_braces_are_written_out(pattern: str, names: list[str], tmp_path: Path) -> None:
    for name in ("train-08", "train-09", "train-10", "val-08", "val-09"):
        (tmp_path / f"{name}.tar").touch()
    assert [path.stem for path in matching_files(tmp_path / pattern)] == names


def test_a_name_in_braces_without_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.tar").touch()
    with pytest.raises(InputError, match=r"no file matches .*val\.tar"):
        matching_files(tmp_path / "{train,val}.tar")
