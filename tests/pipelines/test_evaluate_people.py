"""`--judge label`: people compare without names, and what they say comes into the page."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmalign.config import BlindConfig, EvalConfig, EvaluateImageConfig, RewardConfig
from mmalign.data.files import write_jsonl
from mmalign.data.labels import Labels
from mmalign.data.votes import agreement
from mmalign.pipelines import _label_server, _subject_people, evaluate_image
from mmalign.pipelines._subject_images import Row
from mmalign.pipelines._subject_people import Panel
from mmalign.types import InputError

PROMPTS = [f"prompt {number}" for number in range(6)]
SHADES = {"secret-one": 60, "secret-two": 120, "secret-three": 180}


@pytest.fixture
def config(tmp_path: Path) -> EvaluateImageConfig:
    """Three folders of one picture per prompt, each brighter than the one before."""
    for name, shade in SHADES.items():
        folder = tmp_path / name
        folder.mkdir()
        for number in range(len(PROMPTS)):
            Image.new("RGB", (8, 8), (shade, number, 0)).save(folder / f"{number}.png")
        rows = [{"file_name": f"{n}.png", "prompt": text} for n, text in enumerate(PROMPTS)]
        write_jsonl(folder / "metadata.jsonl", rows)
    return EvaluateImageConfig(
        compare=[str(tmp_path / name) for name in SHADES],
        output_dir=str(tmp_path / "out"),
        device="cpu",
        judge="label",
        label=BlindConfig(port=0),
        evaluation=EvalConfig(rewards=[RewardConfig(name="saturation")]),
    )


def results(config: EvaluateImageConfig) -> Any:
    return json.loads((Path(config.output_dir) / "results.json").read_text())


def people(config: EvaluateImageConfig) -> dict[tuple[str, str], Any]:
    found = results(config)["win_rates"]
    return {(r["subject"], r["against"]): r for r in found if r["judge"] == "people"}


def answer(labels: Labels, root: Path, annotator: str, prefer: str = "brightest") -> None:
    """Judge everything that is shown, as somebody who likes bright pictures would."""
    for shown in labels.next_pairs(annotator, 1000):
        shade = {}
        for side in (shown.left, shown.right):
            with Image.open(root / str(labels.path(side))) as picture:
                pixel = picture.convert("RGB").getpixel((0, 0))
            assert isinstance(pixel, tuple)
            shade[side] = pixel[0]
        sign = 1 if prefer == "brightest" else -1
        labels.judge(annotator, shown.key, max(shade, key=lambda side: sign * shade[side]))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Instead of a server: the people of this list, who answer at once and leave."""
    visitors: list[str] = []

    def serve(labels: Labels, root: Path, config: BlindConfig, **options: Any) -> None:
        for visitor in visitors:
            answer(labels, root, *visitor.split(":"))

    monkeypatch.setattr(_subject_people, "serve", serve)
    return visitors


def test_answers_come_into_the_same_page(
    config: EvaluateImageConfig, served: list[str], capfd: Any
) -> None:
    served += ["ann", "ben"]
    evaluate_image.run(config)
    rates = people(config)
    assert {key: rate["value"] for key, rate in rates.items()} == {
        ("secret-two", "secret-one"): 1.0,
        ("secret-three", "secret-one"): 1.0,
        ("secret-three", "secret-two"): 1.0,
    }
    assert {(rate["n"], rate["wins"]) for rate in rates.values()} == {(6, 6)}
    assert {rate["p"] for rate in rates.values()} == {2 / 64}  # the sign test of six wins
    assert {rate["p_holm"] for rate in rates.values()} == {6 / 64}
    found = results(config)["people"]
    assert (found["names"], found["answers"], found["asked"], found["judged"]) == (2, 36, 18, 18)
    assert found["agreement"] == {"pairs": 18, "share": 1.0, "kappa": 1.0}
    assert found["share_ci95"] == [1.0, 1.0]
    summary = json.loads((Path(config.output_dir) / "summary.json").read_text())
    assert summary["win_rate"]["judge"] == "people"
    page = (Path(config.output_dir) / "report.html").read_text()
    assert "2 people gave 36 answers on 18 of 18 pairs" in page
    assert "secret-three" in page
    assert "by people: 6 wins, 0 losses" in "".join(capfd.readouterr())


def test_nobody_yet_then_some_then_all(config: EvaluateImageConfig, served: list[str]) -> None:
    evaluate_image.run(config)
    assert people(config) == {}
    assert results(config)["people"] is None
    config.judge = "reward"  # answers that are there count without asking for more
    root = Path(config.output_dir) / "samples"
    with closing(Labels(root / "labels.sqlite")) as labels:
        first = labels.next_pairs("ann", 1)[0]
        labels.judge("ann", first.key, None)
    evaluate_image.run(config)
    (only,) = people(config).values()
    assert (only["n"], only["ties"], only["value"]) == (1, 1, None)
    config.judge = "label"
    served += ["ann"]
    evaluate_image.run(config)
    assert sum(rate["n"] for rate in people(config).values()) == 18
    assert sum(rate["ties"] for rate in people(config).values()) == 1


def test_complete_answers_need_no_page(
    config: EvaluateImageConfig, served: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served += ["ann"]
    evaluate_image.run(config)
    monkeypatch.setattr(_subject_people, "serve", None)
    evaluate_image.run(config)  # would call it
    config.label.people = 2
    with pytest.raises(TypeError, match="not callable"):
        evaluate_image.run(config)


def test_disagreement_is_a_tie_and_shows(config: EvaluateImageConfig, served: list[str]) -> None:
    served += ["ann", "ben:darkest"]
    evaluate_image.run(config)
    assert {(rate["ties"], rate["value"]) for rate in people(config).values()} == {(6, None)}
    found = results(config)["people"]
    assert found["agreement"] == {"pairs": 18, "share": 0.0, "kappa": -1.0}


def test_page_and_database_know_no_names(config: EvaluateImageConfig, served: list[str]) -> None:
    served += ["ann"]
    config.label.images_per_prompt = 1
    evaluate_image.run(config)
    root = Path(config.output_dir) / "samples"
    with closing(Labels(root / "labels.sqlite")) as labels:
        shown = labels.next_pairs("ben", 100)
        again = labels.next_pairs("ben", 100)
        other = {one.key: one.left for one in labels.next_pairs("cid", 100)}
    assert shown == again
    assert any(one.left != other[one.key] for one in shown)  # sides are drawn per person
    assert not any(name in json.dumps(shown) for name in SHADES)
    with sqlite3.connect(root / "labels.sqlite") as database:
        sides = database.execute("SELECT winner = on_left FROM judgements").fetchall()
    assert 0 < sum(side for (side,) in sides) < len(sides)


def test_equal_pictures_are_not_asked_about(
    config: EvaluateImageConfig, served: list[str], tmp_path: Path
) -> None:
    config.compare = [f"a={tmp_path / 'secret-one'}", f"b={tmp_path / 'secret-one'}"]
    with pytest.raises(InputError, match="all subjects made the same pictures"):
        evaluate_image.run(config)
    served += ["ann"]
    config.compare.append(str(tmp_path / "secret-two"))
    evaluate_image.run(config)
    assert results(config)["people"]["same"] == 6
    # One picture stands for both: its answers count for either.
    rates = people(config)
    assert rates["secret-two", "a"]["wins"] == rates["secret-two", "b"]["wins"] == 6
    assert ("b", "a") not in rates


def test_the_real_page_closes_when_all_is_answered(
    config: EvaluateImageConfig, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(_label_server, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(_label_server, "UNDO_SECONDS", 0.1)
    ports: list[int] = []
    listen = _label_server.listen

    def remember(host: str, port: int) -> Any:
        opened = listen(host, port)
        ports.append(opened.getsockname()[1])
        return opened

    monkeypatch.setattr(_label_server, "listen", remember)
    pages: list[str] = []

    def visit() -> None:
        root = Path(config.output_dir) / "samples"
        while not ports:
            time.sleep(0.02)
        connection = HTTPConnection("127.0.0.1", ports[0], timeout=20)
        for path in ("/", "/state?annotator=ann"):
            connection.request("GET", path)
            pages.append(connection.getresponse().read().decode())
        connection.close()
        with closing(Labels(root / "labels.sqlite")) as labels:
            answer(labels, root, "ann")

    visitor = threading.Thread(target=visit, daemon=True)
    visitor.start()
    evaluate_image.run(config)
    visitor.join(timeout=30)
    assert "Which model made which picture is in the report" in pages[0]
    assert not any(name in page for page in pages for name in SHADES)
    assert len(people(config)) == 3
    assert "18 of 18 pairs judged by 1 people" in "".join(capfd.readouterr())


def test_intervals_of_agreement_widen_with_disagreement(
    config: EvaluateImageConfig, served: list[str]
) -> None:
    served += ["ann", "ben"]
    evaluate_image.run(config)
    root = Path(config.output_dir) / "samples"
    with closing(Labels(root / "labels.sqlite")) as labels:
        prompt = PROMPTS[0]
        for tally in labels.tallies():
            if tally.pair.prompt == prompt:
                labels.judge("ben", tally.pair.key, None)
        expected = agreement(labels.tallies())
    config.judge = "reward"
    evaluate_image.run(config)
    found = results(config)["people"]
    assert found["agreement"]["kappa"] == pytest.approx(expected.kappa)
    low, high = found["kappa_ci95"]
    assert low < expected.kappa < high == 1.0
    low, high = found["share_ci95"]
    assert low < 15 / 18 < high == 1.0


def test_empty_token_is_refused_before_anything(config: EvaluateImageConfig) -> None:
    config.label.token = ""
    with pytest.raises(InputError, match="token: must not be empty"):
        evaluate_image.run(config)
    assert not Path(config.output_dir).exists()


def test_panel_shows_only_the_first_images(tmp_path: Path) -> None:
    files = []
    for shade in (1, 2):
        paths = [tmp_path / f"{shade}-{number}.png" for number in range(4)]
        for number, path in enumerate(paths):
            Image.new("RGB", (8, 8), (shade, number, 0)).save(path)
        files.append(paths)
    rows = [Row(prompt, index, 0) for prompt in "ab" for index in range(2)]
    assert [question.row for question in Panel(tmp_path, rows, files, 1).questions()] == [0, 2]
    assert len(list(Panel(tmp_path, rows, files, 2).questions())) == 4
