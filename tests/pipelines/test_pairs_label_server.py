"""The real server, over HTTP: judgements survive anything, and strangers get nothing."""

from __future__ import annotations

import http.client
import json
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import pytest
from PIL import Image

from mmalign.data.files import write_jsonl
from mmalign.data.labels import LabelGroup, LabelImage, Labels
from mmalign.data.schema import content_hash


def paint(path: Path, *color: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), color).save(path)


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """`mmalign pairs label` as a process, and requests to it."""

    def __init__(self, folder: Path, *options: str) -> None:
        command = [sys.executable, "-m", "mmalign", "pairs", "label", str(folder), "--port", "0"]
        self.process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        found = re.search(r"http://(\S+):(\d+)/", self.line)
        assert found, self.process.communicate()
        self.port = int(found[2])

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, names)
        response = connection.getresponse()
        answer = Answer(response.status, dict(response.getheaders()), response.read())
        connection.close()
        return answer

    def post(self, path: str, **body: Any) -> Answer:
        return self("POST", path, body, X_Mmalign="label")

    def state(self, annotator: str = "ann") -> Any:
        return self("GET", "/state?" + urlencode({"annotator": annotator})).json()

    def judge(self, annotator: str, side: str | None, state: Any = None) -> Any:
        pair = (state or self.state(annotator))["pair"]
        winner = side and pair[side]
        answer = self.post("/judge", annotator=annotator, pair=pair["key"], winner=winner)
        assert answer.status == 200, answer
        return answer.json()

    def end(self, how: signal.Signals) -> tuple[str, str]:
        self.process.send_signal(how)
        return self.process.communicate(timeout=20)


@pytest.fixture
def serve() -> Iterator[Callable[..., Client]]:
    started: list[Client] = []

    def start(folder: Path, *options: str) -> Client:
        started.append(Client(folder, *options))
        return started[-1]

    yield start
    for client in started:
        client.process.kill()
        client.process.communicate()


def judgements(folder: Path) -> list[tuple[Any, ...]]:
    with sqlite3.connect(folder / "labels.sqlite") as database:
        return database.execute("SELECT pair, annotator, winner FROM judgements").fetchall()


def test_nothing_is_lost_when_the_server_is_killed(
    folder: Path, serve: Callable[..., Client]
) -> None:
    client = serve(folder)
    first = client.state()
    assert first["progress"] == {"total": 3, "judged": 0, "mine": 0, "people": 0}
    second = client.judge("ann", "left", first)
    third = client.judge("ann", None, second)
    assert third["progress"]["mine"] == 2
    client.end(signal.SIGKILL)
    client = serve(folder)
    assert client.state() == third
    pairs = [first["pair"], second["pair"]]
    expected = [
        (pairs[0]["key"], "ann", pairs[0]["left"]),
        (pairs[1]["key"], "ann", None),
    ]
    assert judgements(folder) == expected
    back = client.post("/undo", annotator="ann", pair=third["last"]).json()
    assert back["pair"] == second["pair"]
    client.end(signal.SIGKILL)
    assert judgements(folder) == expected[:1]


def test_server_ends_with_a_summary(folder: Path, serve: Callable[..., Client]) -> None:
    client = serve(folder)
    assert client.line.startswith(f"label at http://127.0.0.1:{client.port}/ ")
    client.judge("ann", "left")
    out, err = client.end(signal.SIGINT)
    assert out.startswith("1 of 3 pairs judged by 1 people: ")
    assert f"mmalign pairs label {folder} --export PATH" in out
    assert (client.process.returncode, err) == (0, "")


def test_server_imports_no_torch() -> None:
    code = (
        "import sys, mmalign.pipelines.pairs_label, mmalign.pipelines._label_app\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_page_and_pictures(folder: Path, serve: Callable[..., Client]) -> None:
    client = serve(folder)
    page = client("GET", "/")
    assert page.status == 200
    assert b"<title>pictures " in page.body
    for name, kind in (("label.js", "text/javascript"), ("label.css", "text/css")):
        asset = client("GET", f"/{name}")
        assert (asset.status, asset.headers["content-type"].partition(";")[0]) == (200, kind)
        assert name.encode() in page.body
    colors = client("GET", "/colors.css")  # those of the other pages
    assert b"prefers-color-scheme: dark" in colors.body
    assert b'@import "colors.css"' in client("GET", "/label.css").body
    assert b"http://" not in page.body + client("GET", "/label.js").body
    pair = client.state()["pair"]
    files = {content_hash(f.read_bytes()).hex(): f for f in folder.glob("*.png")}
    for side in ("left", "right"):
        answer = client("GET", f"/images/{pair[side]}")
        assert (answer.status, answer.headers["content-type"]) == (200, "image/png")
        assert answer.body == files[pair[side]].read_bytes()


def test_other_formats_are_shown_as_png(
    folder: Path, tmp_path: Path, serve: Callable[..., Client]
) -> None:
    rows = []
    for level in range(2):
        Image.new("RGB", (8, 8), (99 * level,) * 3).save(folder / f"{level}.tif")
        rows.append({"file_name": f"{level}.tif", "prompt": "gray"})
    write_jsonl(tmp_path / "table.jsonl", rows)
    client = serve(folder, "--prompts", str(tmp_path / "table.jsonl"))
    answer = client("GET", f"/images/{client.state()['pair']['left']}")
    assert answer.body.startswith(b"\x89PNG")
    assert answer.headers["content-type"] == "image/png"


def test_changed_picture_is_not_shown(folder: Path, serve: Callable[..., Client]) -> None:
    client = serve(folder)
    pair = client.state()["pair"]
    (file,) = [
        f for f in folder.glob("*.png") if content_hash(f.read_bytes()).hex() == pair["left"]
    ]
    paint(file, 1, 2, 3)
    assert client("GET", f"/images/{pair['left']}").status == 410
    assert client.state()["progress"]["total"] == 2


def test_folder_of_a_training_run_is_served_from_its_database(
    folder: Path, serve: Callable[..., Client]
) -> None:
    first = serve(folder)
    first.state()  # before it answers it may not take signals, where its parent ignores them
    first.end(signal.SIGINT)
    (folder / "metadata.jsonl").unlink()
    (folder / "1-0.png").unlink()
    client = serve(folder)
    assert client.state()["progress"]["total"] == 2
    with closing(Labels(folder / "labels.sqlite")) as labels:  # meanwhile the run adds a pair
        files = [folder / name for name in ("0-0.png", "2-1.png")]
        images = [LabelImage(content_hash(f.read_bytes()).hex(), f.name) for f in files]
        labels.add([LabelGroup("new", images)])
    assert client.state()["progress"]["total"] == 3
    client.judge("ann", "left")


def test_locked_database_answers_503(folder: Path, serve: Callable[..., Client]) -> None:
    client = serve(folder)
    pair = client.state()["pair"]
    lock = sqlite3.connect(folder / "labels.sqlite", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    request = {"annotator": "ann", "pair": pair["key"], "winner": pair["left"]}
    answer = client.post("/judge", **request)
    assert answer.status == 503
    assert answer.json() == {"error": "The judgements cannot be saved now: database is locked"}
    assert judgements(folder) == []
    lock.execute("ROLLBACK")
    assert client.post("/judge", **request).status == 200
    assert judgements(folder) == [(pair["key"], "ann", pair["left"])]


def test_foreign_names_and_sites_are_refused(folder: Path, serve: Callable[..., Client]) -> None:
    client = serve(folder)
    for host in ("evil.example", f"evil.example:{client.port}", "127.0.0.1.evil.example", "", "["):
        assert client("GET", "/", Host=host).status == 403, host
    for host in ("localhost", f"127.0.0.1:{client.port}", f"[::1]:{client.port}", "127.0.0.2"):
        assert client("GET", "/", Host=host).status == 200, host
    pair = client.state()["pair"]
    body = {"annotator": "ann", "pair": pair["key"], "winner": None}
    here = f"http://127.0.0.1:{client.port}"
    assert client("POST", "/judge", body).status == 403
    assert client("POST", "/judge", body, Origin=here).status == 403
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        assert client("POST", "/judge", body, X_Mmalign="label", Origin=origin).status == 403
    assert client("GET", "/judge").status == 405
    assert judgements(folder) == []
    assert client("POST", "/judge", body, X_Mmalign="label", Origin=here).status == 200


def test_headers_confine_the_page(folder: Path, serve: Callable[..., Client]) -> None:
    client = serve(folder)
    for path in ("/", "/label.js", "/state?annotator=ann", "/images/none", "/none"):
        headers = client("GET", path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers


def test_no_path_leads_to_a_file(folder: Path, serve: Callable[..., Client]) -> None:
    paint(folder.parent / "secret.png", 9, 9, 9)
    client = serve(folder)
    secret = content_hash((folder.parent / "secret.png").read_bytes()).hex()
    for name in (
        secret,
        "0-0.png",
        "../secret.png",
        "..%2fsecret.png",
        "%2e%2e/secret.png",
        "a%00",
    ):
        assert client("GET", f"/images/{name}").status == 404, name
    for path in ("/labels.sqlite", "/../labels.sqlite", "/metadata.jsonl", "/label.html.j2"):
        assert client("GET", path).status == 404, path


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"x" * 5000, 413),
        (b"[" * 3000, 400),
        (b"not json", 400),
        (b"[]", 400),
        (b'{"annotator": "ann"}', 400),
        (b'{"annotator": ["ann"], "pair": "x", "winner": null}', 400),
        (b'{"annotator": "", "pair": "x", "winner": null}', 400),
        (b'{"annotator": "\\ud800", "pair": "x", "winner": null}', 400),
        (b'{"annotator": "ann", "pair": "\\ud800", "winner": null}', 404),
        (b'{"annotator": "ann", "pair": null, "winner": null}', 404),
        (b'{"annotator": "ann", "pair": "00000000000000000000000000000000", "winner": null}', 404),
    ],
)
def test_bad_bodies(body: bytes, status: int, shared: Client) -> None:
    answer = shared("POST", "/judge", body, X_Mmalign="label")
    assert answer.status == status
    assert set(answer.json()) == {"error"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    root = tmp_path_factory.mktemp("shared")
    for level in range(2):
        paint(root / f"{level}.png", level, 0, 0)
    (root / "prompts.txt").write_text("x\nx\n")
    client = Client(root, "--prompts", str(root / "prompts.txt"))
    yield client
    client.end(signal.SIGKILL)


def test_token(folder: Path, serve: Callable[..., Client]) -> None:
    client = serve(folder, "--token", "se cret;\u00e9")
    assert "/?token=se%20cret%3B%C3%A9 " in client.line
    pair_free = ("/", "/?token=wrong", "/label.js", "/state?annotator=ann", "/images/none", "/x")
    for path in pair_free:
        assert client("GET", path).status == 401, path
    assert client("GET", "/state?annotator=ann&token=se%20cret%3B%C3%A9").status == 401
    assert client("POST", "/judge", {}, X_Mmalign="label").status == 401
    admitted = client("GET", "/?token=se%20cret%3B%C3%A9")
    assert (admitted.status, admitted.headers["location"]) == (303, "/")
    cookie = admitted.headers["set-cookie"]
    assert "httponly" in cookie.lower()
    assert "samesite" in cookie.lower()
    assert client("GET", "/", Cookie=cookie.partition(";")[0]).status == 200
    assert client("GET", "/", Cookie=cookie.partition(";")[0][:-1]).status == 401


def test_other_addresses_need_a_token(folder: Path, serve: Callable[..., Client]) -> None:
    client = serve(folder, "--host", "0.0.0.0")
    found = re.search(r"/\?token=(\S+)", client.line)
    assert found
    assert len(found[1]) >= 20
    assert client("GET", "/state?annotator=ann").status == 401
    headers = {"Authorization": f"Bearer {found[1]}", "Host": "my-machine:80"}
    assert client("GET", "/state?annotator=ann", **headers).status == 200
    other = serve(folder, "--host", "0.0.0.0")
    assert found[1] not in other.line
