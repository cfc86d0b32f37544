from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mmalign.metrics_log import MetricsLog, read_metrics
from mmalign.types import InputError


def test_metrics_log_drops_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n{"step": 3, "lo')
    with MetricsLog(path, keep_until=5) as log:
        log.write(3, {"loss": math.inf})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.25},
        {"step": 3, "loss": None},
    ]


def test_metrics_log_does_not_write_through_links(tmp_path: Path) -> None:
    """A run's folder may have come from a stranger."""
    (tmp_path / "precious").write_text("mine")
    for name in ("metrics.jsonl", ".tmp-metrics.jsonl"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    with MetricsLog(tmp_path / "metrics.jsonl", keep_until=3) as log:
        log.write(1, {"loss": 0.5})
    assert (tmp_path / "precious").read_text() == "mine"
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1


def test_metrics_log_in_a_place_that_cannot_hold_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"metrics\.jsonl: cannot write metrics"):
        MetricsLog(tmp_path / "file" / "metrics.jsonl", keep_until=0)


def test_metrics_log_writes_on_after_a_short_write(tmp_path: Path) -> None:
    """A disk that is nearly full takes the beginning of a line and no error is raised."""

    class Nearly:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            return int(self.file.write(data[:5]))

    log: Any = MetricsLog(tmp_path / "metrics.jsonl", keep_until=0)
    log._file = Nearly(log._file)
    log.write(1, {"loss": 0.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]


def test_metrics_log_on_a_full_disk_is_one_line() -> None:
    log = MetricsLog.__new__(MetricsLog)
    log.path = Path("/dev/full")
    log._file = log.path.open("ab", buffering=0)
    with pytest.raises(InputError, match=r"/dev/full: cannot write metrics.*No space left"):
        log.write(1, {"loss": 0.0})
    log.close()
