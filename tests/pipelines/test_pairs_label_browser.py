"""The page in a real browser, spoken to over its debugging pipe; skipped where there is none."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

BROWSER = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium found")
PROMPT = "<b id=x>red</b> &amp; <script>document.title = 'run'</script>"
FLAGS = "--headless --no-sandbox --disable-gpu --remote-debugging-pipe --no-first-run"
READY = "document.querySelector('#sides:not([hidden]):not(.waiting)') !== null"


class Page:
    """A tab of a headless browser (Chrome DevTools protocol, one JSON message per zero byte)."""

    def __init__(self, profile: Path) -> None:
        (commands, self._to), (self._from, answers) = os.pipe(), os.pipe()
        line = f"exec {BROWSER} {FLAGS} --user-data-dir={profile} 3<&{commands} 4>&{answers}"
        self.process = subprocess.Popen(
            ["bash", "-c", line], pass_fds=(commands, answers), stderr=subprocess.DEVNULL
        )
        os.close(commands)
        os.close(answers)
        self._number, self._buffer, self._session = 0, b"", {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}

    def call(self, method: str, **params: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                part = os.read(self._from, 65536)
                assert part, "the browser has ended"
                self._buffer += part
            line, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._number:
                return answer["result"]

    def run(self, script: str) -> Any:
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get(
            "value"
        )

    def wait(self, script: str) -> None:
        end = time.monotonic() + 20
        while not self.run(script):
            assert time.monotonic() < end, script
            time.sleep(0.02)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": key} if len(key) == 1 and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, **text)


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    opened = Page(tmp_path / "profile")
    yield opened
    opened.process.kill()
    opened.process.wait()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = []
    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 90, 0)).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "prompt": PROMPT}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def serve(folder: Path, port: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mmalign", "pairs", "label", str(folder), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("label at ")
    return process


def winners(folder: Path) -> list[str | None]:
    with sqlite3.connect(folder / "labels.sqlite") as database:
        return [row[0] for row in database.execute("SELECT winner FROM judgements ORDER BY id")]


def test_keys_judge_and_nothing_is_lost(page: Page, folder: Path, port: int) -> None:
    server = serve(folder, port)
    page.call("Page.navigate", url=f"http://127.0.0.1:{port}/")
    page.wait("document.querySelector('dialog[open]') !== null")
    page.run("find('name').value = 'Ann'; document.querySelector('form button').click()")
    page.wait(READY)
    assert page.run("find('prompt').textContent") == PROMPT
    assert page.run("find('prompt').children.length") == 0
    assert page.run("document.title").endswith("mmalign")
    expected: list[str | None] = []
    for key, side in (("1", "left"), ("2", "right"), ("0", None)):
        expected.append(side and page.run(f"shown.{side}"))
        page.press(key)
        page.wait(f"find('count').textContent === '{len(expected)} of 6' && {READY}")
    assert winners(folder) == expected
    page.press("Backspace")
    page.wait(f"find('count').textContent === '2 of 6' && {READY}")
    server.kill()
    server.wait()
    expected[2] = page.run("shown.left")
    page.press("1")
    page.wait("!find('trouble').hidden")
    page.press("2")  # nothing is judged while an answer waits
    assert winners(folder) == expected[:2]
    server = serve(folder, port)
    page.wait(f"find('count').textContent === '3 of 6' && find('trouble').hidden && {READY}")
    assert winners(folder) == expected
    server.kill()
    server.wait()


def test_everything_fits_a_phone(page: Page, folder: Path, port: int) -> None:
    server = serve(folder, port)
    size = {"width": 390, "height": 700, "deviceScaleFactor": 2, "mobile": True}
    page.call("Emulation.setDeviceMetricsOverride", **size)
    page.call("Page.navigate", url=f"http://127.0.0.1:{port}/")
    page.wait("document.querySelector('dialog[open]') !== null")
    page.run("find('name').value = 'Ann'; document.querySelector('form button').click()")
    page.wait(READY)
    for name in ("left", "right", "tie", "undo"):
        box = page.run(f"JSON.stringify(find('{name}').getBoundingClientRect())")
        place = json.loads(box)
        assert place["left"] >= 0
        assert place["right"] <= 390
        assert place["bottom"] <= 700
        assert place["height"] >= 40
    page.run("find('left').click()")
    page.wait(f"find('count').textContent === '1 of 6' && {READY}")
    server.kill()
    server.wait()
