from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

from mmalign.rewards._detector import Detector
from mmalign.rewards._geneval_rules import (
    Found,
    Requirements,
    Rules,
    Wanted,
    check,
    overlap,
    read_requirements,
    relations,
)
from mmalign.rewards.geneval import GenevalReward, _crop
from mmalign.scoring import ScorerError
from mmalign.types import InputError, Reward

from reward_zoo import as_images, eight_bit  # isort: skip

CLASSES = ("person", "mouse", "dog")
ROWS = [
    {
        "tag": "counting",
        "include": [{"class": "dog", "count": 2}],
        "exclude": [{"class": "dog", "count": 3}],
        "prompt": "a photo of two dogs",
    },
    {
        "tag": "position",
        "include": [
            {"class": "person", "count": 1},
            {"class": "computer mouse", "count": 1, "position": ["left of", 0]},
        ],
        "prompt": "a photo of a computer mouse left of a person",
    },
    {
        "tag": "colors",
        "include": [{"class": "dog", "count": 1, "color": "red"}],
        "prompt": "a photo of a red dog",
    },
]


def box(left: float, top: float, score: float = 0.95, side: float = 10) -> Found:
    return Found((left, top, left + side, top + side), score)


def no_colors(found: Sequence[Found], name: str) -> list[str]:
    raise AssertionError("no colour was asked for")


def met(wanted: Requirements, objects: dict[str, list[Found]], **rules: Any) -> list[bool]:
    return check(wanted, objects, Rules(**rules), no_colors)


COUNTING = Requirements((Wanted("dog", 2),), (Wanted("dog", 3),), counting=True)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((0.95, 0.92), [True, True]),
        ((0.95, 0.9), [False, True]),  # 0.9 is not above 0.9
        ((0.95, 0.92, 0.91), [True, False]),
        ((0.95, 0.92, 0.5), [True, True]),
        ((), [False, True]),
    ],
)
def test_counting_is_strict(scores: tuple[float, ...], expected: list[bool]) -> None:
    objects = {"dog": [box(20 * i, 0, score) for i, score in enumerate(scores)]}
    assert met(COUNTING, objects) == expected


def test_other_prompts_need_less_confidence_and_allow_more() -> None:
    wanted = Requirements((Wanted("dog", 1), Wanted("cat", 1)), (), counting=False)
    objects = {"dog": [box(0, 0, 0.31), box(20, 0, 0.4)], "cat": [box(0, 0, 0.3)]}
    assert met(wanted, objects) == [True, False]
    assert met(wanted, objects, threshold=0.2) == [True, True]


def test_overlapping_objects_of_a_class_count_once() -> None:
    objects = {"dog": [box(0, 0, 0.95), box(1, 0, 0.99), box(50, 0, 0.93)]}
    assert met(COUNTING, objects) == [True, False]
    assert met(COUNTING, objects, max_overlap=0.5) == [True, True]
    kept = Rules(max_overlap=0.5).kept(objects, counting=True)["dog"]
    assert [found.box[0] for found in kept] == [1, 50]


def test_overlap_counts_pixels() -> None:
    assert overlap((0, 0, 9, 9), (0, 0, 9, 9)) == 1
    assert overlap((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)
    assert overlap((0, 0, 9, 9), (20, 20, 29, 29)) == 0


@pytest.mark.parametrize(
    ("one", "said"),
    [
        ((0, 50), {"left of"}),
        ((90, 50), {"right of"}),
        ((50, 0), {"above"}),
        ((50, 90), {"below"}),
        ((0, 0), {"left of", "above"}),
        ((50, 50), set()),
        ((51, 50), set()),  # closer than a tenth of both sizes
    ],
)
def test_relations(one: tuple[int, int], said: set[str]) -> None:
    assert relations(box(*one).box, box(50, 50).box, 0.1) == said


def test_position_is_about_all_objects_and_needs_them() -> None:
    wanted = Requirements(
        (Wanted("person", 1), Wanted("dog", 1, position=("left of", 0))), (), counting=False
    )
    assert met(wanted, {"person": [box(50, 0)], "dog": [box(0, 0)]}) == [True, True, True]
    assert met(wanted, {"person": [box(50, 0)], "dog": [box(90, 0)]}) == [True, True, False]
    assert met(wanted, {"dog": [box(0, 0)]}) == [False, True, False]
    assert met(wanted, {"person": [box(50, 0)]}) == [True, False, False]


def test_colors_are_asked_of_the_best_objects() -> None:
    wanted = Requirements((Wanted("dog", 1, color="red"),), (), counting=False)
    asked: list[float] = []

    def name_colors(found: Sequence[Found], name: str) -> list[str]:
        assert name == "dog"
        asked.extend(one.score for one in found)
        return ["red" if one.score > 0.9 else "blue" for one in found]

    objects = {"dog": [box(0, 0, 0.5), box(20, 0, 0.95)]}
    assert check(wanted, objects, Rules(), name_colors) == [True, True]
    assert asked == [0.95]
    assert check(wanted, {"dog": [box(0, 0, 0.5)]}, Rules(), name_colors) == [True, False]


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("yolos")
    torch.manual_seed(0)
    config = YolosConfig(
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"intermediate_size": 48, "image_size": [32, 48], "patch_size": 16},
        **{"num_detection_tokens": 12, "use_mid_position_embeddings": False},
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
    )
    model = YolosForObjectDetection(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(folder)
    return folder


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    return path


def test_detections_equal_transformers(detector: Path) -> None:
    images = as_images(eight_bit(2, 3, 32, 48))
    found = Detector(str(detector), "float32", "cpu")(
        images, ["person", "computer mouse", "dog"], 0.01
    )
    processor = AutoImageProcessor.from_pretrained(detector)
    model = AutoModelForObjectDetection.from_pretrained(detector).eval()
    total = 0
    for image, ours in zip(images, found, strict=True):
        with torch.no_grad():
            outputs = model(**processor(images=image, return_tensors="pt"))
        theirs = processor.post_process_object_detection(outputs, 0.01, [(32, 48)])[0]
        for name, label in zip(ours, CLASSES, strict=True):
            rows = [i for i, n in enumerate(theirs["labels"]) if CLASSES[int(n)] == label]
            total += len(rows)
            assert len(ours[name]) == len(rows)
            for one, row in zip(ours[name], rows, strict=True):
                assert one.score == pytest.approx(float(theirs["scores"][row]), abs=1e-5)
                assert one.box == pytest.approx(theirs["boxes"][row].tolist(), abs=1e-3)
    assert total > 0


def test_reward_follows_the_detections(
    detector: Path, metadata: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [
        {"dog": [box(0, 0), box(9, 9)], "person": [], "computer mouse": []},
        {"dog": [], "person": [box(20, 0)], "computer mouse": [box(40, 0, 0.5)]},
    ]
    options: dict[str, Any] = {"color_model": str(clip_folder), "color_pretrained": None}
    prompts = [str(row["prompt"]) for row in ROWS[:2]]
    monkeypatch.setattr(Detector, "__call__", lambda *_: found)
    reward = GenevalReward(str(metadata), str(detector), **options)
    assert isinstance(reward, Reward)
    assert reward(torch.rand(2, 3, 32, 48), prompts).tolist() == [1, 0]
    part = GenevalReward(str(metadata), str(detector), partial=True, **options)
    torch.testing.assert_close(part(torch.rand(2, 3, 32, 48), prompts), torch.tensor([1, 2 / 3]))


def test_colors_equal_zero_shot_classification(
    detector: Path, metadata: Path, clip_folder: Path
) -> None:
    reward = GenevalReward(str(metadata), str(detector), str(clip_folder), None)
    image = as_images(eight_bit(1, 3, 32, 48))[0]
    mask = torch.zeros(32, 48, dtype=torch.bool)
    mask[4:20, 6:30] = True
    objects = [Found((6.2, 3.8, 29.7, 20.0), 0.9, mask), box(10, 10)]
    said = reward._colors(image, objects, "dog")
    clip = reward.clip
    assert clip is not None
    for found, color in zip(objects, said, strict=True):
        pixels = np.array(image)
        if found.mask is not None:
            pixels[~found.mask.numpy()] = 0x99
        left, top, right, bottom = (round(side) for side in found.box)
        crop = torch.from_numpy(pixels[top:bottom, left:right].copy()).permute(2, 0, 1)[None] / 255
        likeness = {}
        for name in "red orange yellow green blue purple pink brown black white".split():  # noqa: SIM905
            texts = [f"a photo of a {name} dog", f"a photo of a {name}-colored dog"]
            texts.append(f"a photo of a {name} object")
            vector = clip.embed_texts(texts).mean(0)
            likeness[name] = float(clip.embed_images(crop)[0] @ vector / vector.norm())
        assert color == max(likeness, key=lambda name: likeness[name])


def test_crop_of_no_width() -> None:
    crop = _crop(Image.new("RGB", (8, 8)), Found((3.1, 2, 3.2, 4), 1.0))
    assert crop.shape == (1, 3, 2, 1)


def test_unknown_prompts_and_classes(detector: Path, metadata: Path, clip_folder: Path) -> None:
    reward = GenevalReward(str(metadata), str(detector), str(clip_folder), None)
    with pytest.raises(ScorerError, match="has no row for 'a cat'"):
        reward(torch.rand(1, 3, 32, 48), ["a cat"])
    row = {"prompt": "x", "include": [{"class": "zebra", "count": 1}]}
    metadata.write_text(json.dumps(row))
    with pytest.raises(InputError, match="has no class 'zebra'"):
        GenevalReward(str(metadata), str(detector), str(clip_folder), None)
    with pytest.raises(InputError, match=r"rules: .*thresold"):
        GenevalReward(str(metadata), str(detector), rules={"thresold": 1})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "x"}', "line 1: is no row of GenEval's metadata: KeyError: 'include'"),
        ('{"prompt": "x", "include": []}', "something to include"),
        ('{"prompt": "x", "include": [{"class": "dog", "count": 0}]}', "a count of 1 or more"),
        (
            '{"prompt": "x", "include": [{"class": "dog", "count": 1, "color": "mauve"}]}',
            "color 'mauve' is none of",
        ),
        (
            '{"prompt": "x", "include": [{"class": "dog", "count": 1, "position": ["above", 0]}]}',
            "no relation to an earlier object",
        ),
        ("not json", "line 1"),
    ],
)
def test_bad_metadata(row: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(row)
    with pytest.raises(InputError, match=message):
        read_requirements(tmp_path / "rows.jsonl")
