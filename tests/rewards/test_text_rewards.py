"""Rewards of answers: length, CHAIR, yes and no, and language models that rate."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from json_server import images_of, json_server, text_of
from PIL import Image

from mmalign.config import RewardConfig
from mmalign.rewards import load_reward
from mmalign.rewards._judged import read_rating
from mmalign.scoring import score_samples
from mmalign.types import ImageRef, InputError, Response

pytestmark = pytest.mark.usefixtures("no_pauses")

RED = Image.new("RGB", (4, 4), "red")


def reward(name: str, **options: Any) -> Any:
    return load_reward(RewardConfig(name=name, options=options), modality="text")


def score(scorer: Any, *texts: str, **fields: Any) -> list[float]:
    samples = [Response(text=text, images=(RED,), fields=fields) for text in texts]
    found: list[float] = score_samples(scorer, samples, ["What is there?"] * len(texts)).tolist()
    return found


@contextmanager
def model(answer: Callable[[str], dict[str, Any]]) -> Iterator[Any]:
    """Run a language model; `asked` holds texts, numbers of images and temperatures."""
    asked: list[tuple[str, int, float]] = []

    def choose(request: dict[str, Any]) -> tuple[int, Any]:
        asked.append((text_of(request), images_of(request), request["temperature"]))
        return 200, {"choices": [answer(text_of(request))]}

    with json_server(choose) as running:
        running.asked = asked
        running.endpoint = {"url": running.url, "model_name": "m", "concurrency": 2}
        yield running


def says(text: str) -> dict[str, Any]:
    return {"message": {"content": text}}


def test_length_in_words_and_its_limits() -> None:
    texts = ["one two three", "one", ""]
    assert score(reward("length"), *texts) == [3.0, 1.0, 0.0]
    assert score(reward("length", minimum=1, maximum=2), *texts) == [-1.0, 0.0, -1.0]
    assert score(reward("length", maximum=2), *texts) == [-1.0, 0.0, 0.0]
    with pytest.raises(InputError, match="no answer has 5 to 2 words"):
        reward("length", minimum=5, maximum=2)


CAPTION = "A man walks his dog past a bench. The dog is happy."


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, -1 / 4),
        ({"measure": "count"}, -1.0),
        ({"measure": "any"}, -1.0),
        ({"coverage": 0.5}, -1 / 4 + 0.5 * 2 / 3),
    ],
)
def test_chair_by_hand(options: dict[str, Any], expected: float) -> None:
    """Mentions are man, dog, bench, dog: the bench is not there, the car is not named."""
    found = score(reward("chair", **options), CAPTION, objects=["person", "dogs", "car"])
    assert found == pytest.approx([expected])
    if "coverage" not in options:
        assert score(reward("chair", **options), "How lovely!", objects=["car"]) == [0.0]


def test_chair_finds_the_image_in_labels_by_id_or_file_name(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('{"42": ["dog"], "7": ["bench"]}')
    scorer = reward("chair", labels=str(tmp_path / "labels.json"))
    RED.save(tmp_path / "COCO_val2014_000000000042.png")
    file = ImageRef(tmp_path / "COCO_val2014_000000000042.png", "")
    assert score(scorer, "a dog", "a bench", image_id=7) == [-1.0, 0.0]
    assert score_samples(scorer, [Response(text="a dog", images=(file,))], [""]).tolist() == [0.0]
    with pytest.raises(InputError, match="nothing says what is in image 8"):
        score(scorer, "a dog", image_id=8)
    with pytest.raises(InputError, match="neither objects nor image_id"):
        score(scorer, "a dog")


def test_chair_reads_cocos_annotations(tmp_path: Path) -> None:
    instances = {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 5, "name": "dog"}],
        "annotations": [{"image_id": 1, "category_id": 5}],
    }
    captions = {"annotations": [{"image_id": 2, "caption": "a wooden bench"}]}
    (tmp_path / "instances_val.json").write_text(json.dumps(instances))
    (tmp_path / "captions_val.json").write_text(json.dumps(captions))
    scorer = reward("chair", annotations=str(tmp_path))
    assert score(scorer, "a dog", "a bench", image_id=1) == [0.0, -1.0]
    assert score(scorer, "a dog", "a bench", image_id=2) == [-1.0, 0.0]


@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        ({"labels": "a", "annotations": "b"}, {}, "labels or annotations, not both"),
        ({"measure": "most"}, {}, "measure must be one of share, count, any"),
        ({"labels": "/nowhere.json"}, {}, "nowhere.json"),
        ({}, {"objects": "dog"}, "failed for sample 0: objects is not a list of names"),
        ({}, {"objects": ["unicorn"]}, "object 'unicorn' is not in the vocabulary"),
    ],
)
def test_chair_problems(options: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        score(reward("chair", **options), "a dog", **fields)


def test_yes_no_against_a_label() -> None:
    texts = ["Yes, there is.", "No.", "I cannot tell.", "There is a dog."]
    assert score(reward("yes_no"), *texts, label="yes") == [1.0, 0.0, 0.0, 1.0]
    assert score(reward("yes_no"), *texts, label="No") == [0.0, 1.0, 0.0, 0.0]
    with pytest.raises(InputError, match="sample 0: the row has no label of yes or no"):
        score(reward("yes_no"), "Yes.")


def test_yes_no_asks_back_about_each_object_once() -> None:
    chances = {"a dog": (0.9, 0.1), "a bench": (0.1, 0.3), "an apple": (0.0, 0.0)}

    def answer(text: str) -> dict[str, Any]:
        yes, no = next(p for name, p in chances.items() if name in text)
        top = [{"token": t, "logprob": math.log(p)} for t, p in (("Yes", yes), ("no", no)) if p]
        return {"logprobs": {"content": [{"top_logprobs": top}]}}

    with model(answer) as running:
        scorer = reward("yes_no", endpoint=running.endpoint)
        texts = ["A dog on a bench. The dog sleeps.", "An apple.", "How lovely!", "Dogs"]
        found = score(scorer, *texts)
    assert found == pytest.approx([(0.9 + 0.25) / 2, 0.5, 0.5, 0.9])
    asked = sorted(running.asked)
    assert [text for text, _, _ in asked] == [
        "Is there a bench in the image? Please answer yes or no.",
        "Is there a dog in the image? Please answer yes or no.",
        "Is there a dog in the image? Please answer yes or no.",
        "Is there an apple in the image? Please answer yes or no.",
    ]
    assert {images for _, images, _ in asked} == {1}


def test_judge_shows_image_question_and_answer() -> None:
    with model(lambda text: says("Fine.\nScore: 7")) as running:
        scorer = reward("judge", endpoint=running.endpoint)
        assert score(scorer, "A {question} of cats.") == [7.0]
    ((text, images, temperature),) = running.asked
    assert "Question: What is there?\nAnswer: A {question} of cats.\n" in text
    assert "asked about the image, and" in text
    assert (images, temperature, scorer.range) == (1, 0.0, (1.0, 10.0))


def test_judge_without_images() -> None:
    with model(lambda text: says("3")) as running:
        assert score(reward("judge", endpoint=running.endpoint, images=False), "x") == [3.0]
    assert running.asked[0][1] == 0
    assert "an image that you do not see" in running.asked[0][0]


def test_judge_is_asked_again_about_what_cannot_be_read() -> None:
    replies = {"cats": iter(["Score: 8"]), "dogs": iter(["Hm.", "Score: 11", "Score: 2"])}

    def answer(text: str) -> dict[str, Any]:
        return says(next(replies["cats" if "cats" in text else "dogs"]))

    with model(answer) as running:
        assert score(reward("judge", endpoint=running.endpoint), "cats", "dogs") == [8.0, 2.0]
    assert [temperature for _, _, temperature in running.asked] == [0.0, 0.0, 0.5, 0.5]


def test_judge_that_never_rates_names_the_sample() -> None:
    def answer(text: str) -> dict[str, Any]:
        return says("Score: 4" if "cats" in text else "As an AI I cannot.")

    with (
        model(answer) as running,
        pytest.raises(
            InputError,
            match=r"reward judge got no rating of 1 to 10: 'As an AI I cannot\.' for sample 1$",
        ),
    ):
        score(reward("judge", endpoint=running.endpoint, attempts=2), "cats", "dogs")
    assert len(running.asked) == 3


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Score: 4", 4.0),
        ("**Score:** 4.5", 4.5),
        ("Score: 4/5. In short, good.", 4.0),
        ("A 3 for truth, a 2 for the rest.\nScore: 3", 3.0),
        ("First I thought rating: 2, now: Rating = 5", 5.0),
        ("Score (1 to 5): good", None),
        ("4", 4.0),
        ("4 of 5", None),
        ("Score: 6", None),
        ("Score: -1", None),
        ("", None),
        ("excellent", None),
    ],
)
def test_reading_ratings(reply: str, rating: float | None) -> None:
    assert read_rating(reply, 1.0, 5.0) == rating


def test_captions_are_evidence() -> None:
    with model(lambda text: says("Score: 5")) as running:
        scorer = reward("caption_evidence", endpoint=running.endpoint)
        found = score(scorer, "A dog.", captions=["A dog runs.", "It barks."], reference="Dog.")
        assert found == [5.0]
        assert score(scorer, "A dog.", caption="A dog.") == [5.0]
        with pytest.raises(InputError, match="sample 0: the row has no captions"):
            score(scorer, "A dog.")
    (first, second) = (text for text, images, _ in running.asked if images == 0)
    assert "Description: A dog runs.\nIt barks.\n" in first
    assert "Reference answer: Dog.\nAnswer to judge: A dog." in first
    assert "Reference answer: none\n" in second
    assert scorer.range == (1.0, 5.0)


@pytest.mark.parametrize("name", ["judge", "caption_evidence", "yes_no"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"endpoint": {"url": "http://h/"}}, "url and model_name are required"),
        ({"endpoint": {"uri": "http://h/"}}, "endpoint has no 'uri': the nearest is 'url'"),
    ],
)
def test_endpoints_are_checked(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        reward(name, **options)


@pytest.mark.parametrize(
    ("name", "template", "message"),
    [
        ("judge", "Rate it.", "template has no {response}"),
        ("caption_evidence", "Rate {response}.", "template has no {caption}"),
    ],
)
def test_templates_are_checked(name: str, template: str, message: str) -> None:
    options = {"endpoint": {"url": "http://h/", "model_name": "m"}, "template": template}
    with pytest.raises(InputError, match=message):
        reward(name, **options)


def test_a_server_that_is_down_is_one_line_and_not_asked_sample_by_sample() -> None:
    down = {"url": "http://127.0.0.1:9/", "model_name": "m", "retries": 1}
    with pytest.raises(InputError, match=r"^endpoint m: .* cannot be reached: .*\(2 attempts\)$"):
        score(reward("judge", endpoint=down), "one", "two")


@pytest.mark.parametrize(("name", "modality"), [("chair", "image"), ("brightness", "text")])
def test_rewards_score_what_they_are_for(name: str, modality: Any) -> None:
    what = {"image": "scores answers, not images", "text": "scores images, not answers"}
    with pytest.raises(InputError, match=what[modality]):
        load_reward(RewardConfig(name=name), modality=modality)


def letters(samples: list[Response], prompts: list[str]) -> list[int]:
    return [len(sample.text) for sample in samples]


def test_functions_score_answers_too() -> None:
    assert score(reward(f"{__name__}:letters"), "abc", "") == [3.0, 0.0]
