"""Every method trains on a device that is not the CPU as it does on the CPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import other_device
import pytest
import torch
from shared_jobs import JOBS, World, check_same, lines, run
from two_processes import in_one

OF_SEVERAL = ("sharded", "deepspeed")
NAMES = [name for name in JOBS if not any(part in name for part in OF_SEVERAL)]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


@pytest.fixture(scope="module")
def there(world: World) -> Path:
    """All runs on the other device, in a process of its own, which keeps it for good."""
    folder = world.folder / "there"

    def everything() -> None:
        other_device.install(folder)
        for name in NAMES:
            run(name, world, folder / name, 1, device="auto")

    ended = in_one(everything, folder, timeout=280)
    assert ended.codes == [0], ended.output[0][-3000:]
    return folder


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
def test_it_trains_what_the_cpu_trains(name: str, world: World, there: Path) -> None:
    if name == "online-dpo":  # a grey level of a picture is another pair, with other noise
        assert len(lines(there / name)) == 1
    else:  # operations are put together from others, which rounds differently
        check_same(name, world, there, tolerance=1e-5)


@needs_compiler
def test_tensors_of_two_devices_do_not_mix(tmp_path: Path) -> None:
    """The device would see what was left on the CPU."""

    def check() -> None:
        other_device.install(tmp_path)
        here, away = torch.arange(3.0), torch.arange(3.0, device=other_device.NAME)
        assert away.device == torch.device(other_device.DEVICE)
        assert torch.equal((2 * away + torch.tensor(1.0)).cpu(), 2 * here + 1)
        for mix in (lambda: here + away, lambda: torch.stack([here, away]), lambda: away @ here):
            with pytest.raises(RuntimeError, match=r"on the CPU are \(3,\)"):
                mix()
        with pytest.raises((RuntimeError, TypeError)):
            away.numpy()

    ended = in_one(check, tmp_path)
    assert ended.codes == [0], ended.output[0]
