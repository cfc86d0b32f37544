"""Whatever strangers write is read, or refused with one line of ours; nothing else happens."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # as for a script there
from fuzz_targets import load_targets
from fuzz_targets.harness import check, prepare

TARGETS = load_targets()
TEXTS = st.text(max_size=12) | st.sampled_from(["../a.png", "/etc/hostname", "a.png", "\ud800", ""])
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.just(10**400)
    | TEXTS
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the paths of all values inside a JSON value."""
    found = [path]
    if isinstance(value, dict):
        found += [p for key, item in value.items() for p in places(item, (*path, key))]
    elif isinstance(value, list):
        found += [p for index, item in enumerate(value) for p in places(item, (*path, index))]
    return found


@st.composite
def nearly(draw: st.DrawFn, name: str) -> bytes:
    """A seed with one to three changes: JSON values replaced or left out, or bytes."""
    seed: bytes = draw(st.sampled_from(TARGETS[name].seeds))
    try:
        content = json.loads(seed)
    except ValueError:
        return _bytes(draw, seed)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(content)))
        if not path:
            content = draw(VALUES)
            continue
        content = copy.deepcopy(content)
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        if draw(st.booleans()):
            parent[path[-1]] = draw(VALUES)
        else:
            del parent[path[-1]]
    return json.dumps(content).encode()


def _bytes(draw: st.DrawFn, seed: bytes) -> bytes:
    data = bytearray(seed)
    for _ in range(draw(st.integers(1, 6))):
        if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fuzz")
    prepare(place)
    return place


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_read(name: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    read = [check(name, tmp_path, seed) for seed in TARGETS[name].seeds]
    assert all(read) or not TARGETS[name].sound


@pytest.mark.parametrize("name", TARGETS)
def test_nearly_right_input(name: str, folder: Path) -> None:
    @settings(
        max_examples=15,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=nearly(name))
    def read(data: bytes) -> None:
        check(name, folder, data)

    read()


DEEP = b"[" * 200_000


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"null", b"[]", b"{}", b"\xff\xfe{\0}\0", DEEP, b'{"a":' * 50_000, b"9" * 5000],
    ids=["empty", "zero", "null", "list", "object", "utf16", "deep", "deep objects", "long number"],
)
def test_extremes(name: str, data: bytes, folder: Path) -> None:
    check(name, folder, data)
