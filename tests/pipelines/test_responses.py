"""A model answers a benchmark: which images it sees, what is kept, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmark_files import LABELS, MMHAL, POPE, run, write
from PIL import Image

from mmalign.types import Question


class FakeVlm:
    """Answers with the question and the size of the image, and remembers how it was asked."""

    fingerprint = "fake"

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.most = sys.maxsize

    def generate(self, questions: Sequence[Question], config: Any) -> list[str]:
        if len(self.asked) >= self.most:
            raise KeyboardInterrupt
        self.asked += [question.prompt for question in questions]
        assert config.max_new_tokens == 7
        sizes = [Image.open(question.images[0].data).size for question in questions]  # type: ignore[union-attr,arg-type]
        return [f"{q.prompt} dog {w}x{h}" for q, (w, h) in zip(questions, sizes, strict=True)]


@pytest.fixture
def model(files: Path, monkeypatch: pytest.MonkeyPatch) -> FakeVlm:
    """A folder of images, and a model in place of the one `--model fake` would load."""
    pictures = files / "pictures"
    pictures.mkdir()
    for number, name in enumerate(("COCO_val2014_000000000001", "COCO_val2014_000000000002")):
        Image.new("RGB", (4 + number, 5)).save(pictures / f"{name}.jpg")
    for number in (1, 2, 3):
        Image.new("RGB", (8, number)).save(pictures / f"AMBER_{number}.jpg")
    fake = FakeVlm()

    def load_vlm(config: Any, device: str) -> FakeVlm:
        assert (config.model, device) == ("fake", "cpu")
        return fake

    monkeypatch.setitem(sys.modules, "mmalign.adapters", SimpleNamespace(load_vlm=load_vlm))
    return fake


MODEL = "--model fake --images pictures --device cpu --generation.max_new_tokens 7"


def responses() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out/responses.jsonl").read_text().splitlines()]


def test_model_answers_in_the_official_form(files: Path, model: FakeVlm) -> None:
    run("chair", f"{MODEL} --labels labels.json --prompt Look!")
    assert responses()[1] == {"image_id": 2, "question": "Look!", "caption": "Look! dog 5x5"}
    run("pope", f"{MODEL} --labels coco_pope_random.json")
    assert responses()[0] == {
        "question_id": 1,
        "question": POPE[0]["text"],
        "answer": f"{POPE[0]['text']} Please answer yes or no. dog 4x5",
    }
    run("amber", f"{MODEL} --annotations amber --evaluation_type g")
    assert responses() == [{"id": 1, "response": "Query 1? dog 8x1"}]
    write(files / "questions.jsonl", [{"image_id": i, "question": f"Q{i}"} for i in (1, 2)])
    run("objhal", f"{MODEL} --labels labels.json --questions questions.jsonl")
    assert responses()[0] == {"image_id": 1, "question": "Q1", "answer": "Q1 dog 4x5"}
    template = [{k: v for k, v in row.items() if k != "model_answer"} for row in MMHAL]
    write(files / "template.json", [row | {"image_src": "a/AMBER_1.jpg"} for row in template])
    run("mmhal", f"{MODEL} --labels template.json")
    assert responses()[1]["model_answer"] == "1: what is it? dog 8x1"


def test_answers_of_a_model_score_the_same_again(files: Path, model: FakeVlm) -> None:
    first = run("chair", f"{MODEL} --labels labels.json")["metrics"]
    Path("out/responses.jsonl").rename("again.jsonl")
    assert run("chair", "--responses again.jsonl --labels labels.json")["metrics"] == first


def test_interrupted_answers_go_on(files: Path, model: FakeVlm) -> None:
    labels = [POPE[0] | {"question_id": i, "text": f"Is there a {i}?"} for i in range(9)]
    (files / "labels.jsonl").write_text("\n".join(map(json.dumps, labels)))
    options = f"{MODEL} --labels labels.jsonl --generation.batch_size 1"
    model.most = 4
    run("pope", options, code=130)
    assert len(model.asked) == 4
    with Path("out/model_answers.jsonl").open("a") as stream:
        stream.write('{"request": "cut o')
    model.most = sys.maxsize
    run("pope", options)
    assert len(model.asked) == len(set(model.asked)) == 9  # nobody was asked twice
    assert [row["question_id"] for row in responses()] == list(range(9))
    assert all(row["question"] in row["answer"] for row in responses())
    run("pope", options.replace("batch_size 1", "seed 1 --generation.batch_size 1"))
    assert len(model.asked) == 18  # other settings, other answers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model fake --labels labels.json", "images: give --images DIR"),
        (f"{MODEL} --labels labels3.json", "labels3.json: no image '3' in pictures"),
        ("--model fake --images amber --labels labels.json", "images: amber has no images"),
        ("--model fake --images pope.jsonl --labels labels.json", "pope.jsonl is not a folder"),
    ],
)
def test_images_that_are_missing(
    files: Path, model: FakeVlm, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    write(files / "labels3.json", LABELS | {"3": ["cat"]})
    run("chair", options, code=2)
    assert message in capsys.readouterr().err


def test_images_that_are_links_out_of_the_folder(
    files: Path, model: FakeVlm, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = files / "pictures" / "COCO_val2014_000000000001.jpg"
    picture.rename(files / "elsewhere.jpg")
    picture.symlink_to(files / "elsewhere.jpg")
    run("chair", f"{MODEL} --labels labels.json", code=2)
    assert "is a link out of pictures" in capsys.readouterr().err
    assert not model.asked
