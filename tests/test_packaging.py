from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MAPPED = ("rewards", "pipelines", "configs")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def package_folders() -> dict[str, Path]:
    """Find every package of the working tree, by name, without following the links."""
    found = {}
    for top, prefix in [("mmalign", "mmalign"), *((name, f"mmalign.{name}") for name in MAPPED)]:
        for folder, _, files in os.walk(ROOT / top):
            if "__init__.py" in files:
                inside = Path(folder).relative_to(ROOT / top).parts
                found[".".join((prefix, *inside))] = Path(folder)
    return found


def test_every_package_is_listed(project: dict[str, Any]) -> None:
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(package_folders())


def test_every_folder_with_modules_is_a_package() -> None:
    packages = set(package_folders().values())
    for top in ("mmalign", *MAPPED):
        for file in (ROOT / top).rglob("*.py"):
            assert file.parent in packages, file


@pytest.mark.parametrize("name", MAPPED)
def test_links_for_static_tools_resolve(name: str) -> None:
    link = ROOT / "mmalign" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("name", ["rewards", "pipelines"])
def test_a_second_copy_of_a_package_is_refused(name: str) -> None:
    """With the repository root on sys.path every class would exist twice."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"import mmalign.{name}, not {name}" in done.stderr


def test_tests_are_not_a_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


def test_pins_name_versions_only(project: dict[str, Any]) -> None:
    pins = project["tool"]["uv"]["constraint-dependencies"]
    assert pins
    for pin in pins:
        name, _, version = pin.partition("==")
        assert version.replace(".", "").isalnum(), pin
        assert "/" not in pin
        assert name == name.lower()


def test_direct_dependencies_are_pinned(project: dict[str, Any]) -> None:
    pinned = {pin.partition("==")[0] for pin in project["tool"]["uv"]["constraint-dependencies"]}
    groups = [r for group in project["dependency-groups"].values() for r in group]
    wanted = [r for r in (*project["project"]["dependencies"], *groups) if isinstance(r, str)]
    for requirement in wanted:
        name = requirement.partition(">")[0]
        assert name in pinned, name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the tree, without network and without touching the tree."""
    copy = tmp_path_factory.mktemp("build") / "tree"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("mmalign", *MAPPED):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    out = copy.parent / "dist"
    subprocess.run(
        [sys.executable, "-c", build, str(out)], cwd=copy, check=True, capture_output=True
    )
    (path,) = out.glob("*.whl")
    return path


def test_wheel_installs_one_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
        assert {top for top in tops if not top.endswith(".dist-info")} == {"mmalign"}


def test_wheel_has_every_module_and_data_file(wheel: Path) -> None:
    expected = set()
    for top, prefix in [("mmalign", "mmalign"), *((name, f"mmalign/{name}") for name in MAPPED)]:
        for folder, _, files in os.walk(ROOT / top):
            inside = Path(folder).relative_to(ROOT / top)
            if "__pycache__" not in inside.parts:
                expected |= {(Path(prefix) / inside / file).as_posix() for file in files}
    with zipfile.ZipFile(wheel) as archive:
        assert expected <= set(archive.namelist())
        assert all(
            info.file_size > 0 for info in archive.infolist() if info.filename.endswith(".yaml")
        )


def test_wheel_has_the_command_and_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry,) = [name for name in names if name.endswith("entry_points.txt")]
        assert "mmalign = mmalign.cli:main" in archive.read(entry).decode()
        (licence,) = [name for name in names if name.endswith("/LICENSE")]
        assert "Apache License" in archive.read(licence).decode()
