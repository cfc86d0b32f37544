"""The real server, over HTTP: judgements survive anything; and what is exported trains."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import pytest
from PIL import Image

from mmalign import cli
from mmalign.config import (
    DiffusionDpoConfig,
    LoraConfig,
    PairsConfig,
    PairsLabelConfig,
)
from mmalign.data.files import write_jsonl
from mmalign.data.labels import LabelGroup, Labels
from mmalign.data.readers import read_pairs
from mmalign.data.schema import content_hash
from mmalign.pipelines import diffusion_dpo
from mmalign.pipelines._label_folder import list_groups

PROMPTS = ["red", "a red", "red <b>&amp;</b>"]


def paint(path: Path, *color: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), color).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures of each prompt, as `mmalign generate` writes them."""
    rows = []
    for number, prompt in enumerate(PROMPTS):
        for index in range(2):
            name = f"{number}-{index}.png"
            paint(tmp_path / "pictures" / name, 80 * number, 200 * index, 0)
            rows.append({"file_name": name, "prompt": prompt})
    write_jsonl(tmp_path / "pictures" / "metadata.jsonl", rows)
    return tmp_path / "pictures"


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


def test_server_imports_no_torch(folder: Path, tmp_path: Path) -> None:
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


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*argv: object) -> str:
        assert cli.main(["pairs", "label", *map(str, argv)]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        return err

    return run


def test_unusable_folders(folder: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red\na red\n")
    assert "images: is required" in fails()
    assert "no such file or folder" in fails(tmp_path / "absent")
    assert "is not a folder" in fails(prompts)
    assert "give --prompts FILE" in fails(empty)
    assert "has no images" in fails(empty, "--prompts", prompts)
    assert "no such file" in fails(folder, "--prompts", tmp_path / "absent.txt")
    (folder / "metadata.jsonl").unlink()
    assert "has 6 images but" in fails(folder, "--prompts", prompts)
    for file in sorted(folder.glob("*.png"))[2:]:
        file.unlink()
    line = fails(folder, "--prompts", prompts)
    assert "fewer than two different images of the prompt 'red'" in line
    line = fails(folder, "--prompts", prompts, "--on_bad_row", "skip")
    assert line.splitlines()[-1].endswith("has no prompt with two different images to compare")
    assert not list(folder.glob("labels*"))


def test_unusable_options(
    folder: Path, fails: Callable[..., str], serve: Callable[..., Client]
) -> None:
    assert "nobody has judged" in fails(folder, "--export", folder / "out")
    assert "token: must not be empty" in fails(folder, "--token", "")
    assert "port: must be between" in fails(folder, "--port", "70000")
    client = serve(folder)
    line = fails(folder, "--port", client.port)
    assert "choose another --host or --port" in line
    assert "no pair has a majority" in fails(folder, "--export", folder / "out")


def groups(folder: Path, **options: Any) -> list[LabelGroup]:
    found = list_groups(PairsLabelConfig(images=str(folder), **options))
    assert found is not None
    return found


def names(found: list[LabelGroup]) -> list[tuple[str, list[str]]]:
    return [(group.prompt, [image.path for image in group.images]) for group in found]


def test_folders_that_say_what_they_have(folder: Path, tmp_path: Path) -> None:
    pictures = [(p, [f"{n}-0.png", f"{n}-1.png"]) for n, p in enumerate(PROMPTS)]
    assert names(groups(folder)) == pictures
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red\nred\n")  # chooses among the folder's prompts, in this order
    assert names(groups(folder, prompts=str(prompts))) == [pictures[1], pictures[0]]
    pair = {"prompt": "p", "chosen_file_name": "0-0.png", "rejected_file_name": "1-0.png"}
    write_jsonl(folder / "metadata.jsonl", [pair])
    assert names(groups(folder)) == [("p", ["0-0.png", "1-0.png"])]
    write_jsonl(
        folder / "scores.jsonl", [{"file_name": f"{n}-0.png", "prompt": "s"} for n in range(3)]
    )
    assert names(groups(folder)) == [("s", ["0-0.png", "1-0.png", "2-0.png"])]


def test_candidates_of_an_unfinished_build(tmp_path: Path) -> None:
    for prompt in ("red", "a red"):
        label = content_hash(prompt.encode()).hex()
        for index in range(2):
            paint(tmp_path / "candidates" / label / f"{index:03d}.png", len(prompt), index, 0)
    (tmp_path / "prompts.txt").write_text("red\na red\n")
    found = groups(tmp_path, prompts=str(tmp_path / "prompts.txt"))
    assert [(group.prompt, len(group.images)) for group in found] == [("red", 2), ("a red", 2)]


def test_pictures_outside_the_folder_are_refused(folder: Path, fails: Callable[..., str]) -> None:
    paint(folder.parent / "secret.png", 9, 9, 9)
    (folder / "0-0.png").unlink()
    (folder / "0-0.png").symlink_to(folder.parent / "secret.png")
    assert "is a link out of" in fails(folder)
    write_jsonl(folder / "metadata.jsonl", [{"file_name": "../secret.png", "prompt": "x"}])
    assert "'..' is not allowed" in fails(folder)


def test_same_picture_and_unreadable_picture(
    folder: Path, fails: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(folder / "0-0.png", folder / "0-1.png")
    assert "fewer than two different images of the prompt 'red'" in fails(folder)
    (folder / "1-1.png").write_bytes(b"text")
    found = groups(folder, on_bad_row="skip")
    assert [group.prompt for group in found] == PROMPTS[2:]
    assert "1-1.png: not an image" in caplog.text


def judged(folder: Path) -> Path:
    """Two of three people prefer the greener picture of two prompts; the third is a tie."""
    labels = Labels(folder / "labels.sqlite")
    labels.add(groups(folder))
    green = {content_hash(f.read_bytes()).hex() for f in folder.glob("*-1.png")}
    for number, annotator in enumerate(("ann", "bob", "cy")):
        while shown := labels.next_pairs(annotator, 1):
            (pair,) = shown
            right = pair.left if (pair.left in green) == (number < 2) else pair.right
            labels.judge(annotator, pair.key, None if pair.prompt == PROMPTS[2] else right)
    labels.close()
    return folder


@pytest.mark.parametrize("name", ["pairs", "pairs.parquet", "pairs.tar"])
def test_export(
    folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / name
    assert cli.main(["pairs", "label", str(judged(folder)), "--export", str(target)]) == 0
    out = capsys.readouterr().out
    assert f"2 pairs in {target}; 1 ties and 0 pairs without their images left out; " in out
    assert "people agree on 33% of 3 pairs judged by several, Fleiss' kappa" in out
    table = read_pairs(PairsConfig(path=str(target)))
    assert {pair.prompt for pair in table.pairs} == set(PROMPTS[:2])
    for pair in table.pairs:
        assert (pair.source, pair.score_chosen, pair.score_rejected) == ("people", 2 / 3, 1 / 3)
        if name == "pairs":
            number = PROMPTS.index(pair.prompt)
            assert isinstance(pair.chosen, tuple)
            assert isinstance(pair.chosen.data, Path)
            assert pair.chosen.data.read_bytes() == (folder / f"{number}-1.png").read_bytes()
    if name == "pairs":
        row = json.loads((target / "metadata.jsonl").read_text().splitlines()[0])
        assert row["chosen_file_name"].startswith("images/")
        assert cli.main(["pairs", "validate", "--path", str(target)]) == 0


def test_export_leaves_out_what_has_changed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judged(folder)
    os.remove(folder / "0-0.png")
    cli.main(["pairs", "label", str(folder), "--export", str(tmp_path / "out")])
    assert "1 pairs in" in (out := capsys.readouterr().out)
    assert "1 pairs without their images left out" in out


def test_exported_pairs_train(folder: Path, tiny_sd: Path, tmp_path: Path) -> None:
    cli.main(["pairs", "label", str(judged(folder)), "--export", str(tmp_path / "pairs")])
    config = DiffusionDpoConfig(
        model=str(tiny_sd),
        output_dir=str(tmp_path / "run"),
        device="cpu",
        offline=True,
        lora=LoraConfig(rank=2),
        pairs=PairsConfig(path=str(tmp_path / "pairs"), resolution=16),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
    )
    diffusion_dpo.run(config)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert json.loads(lines[-1])["grad_norm"] > 0
