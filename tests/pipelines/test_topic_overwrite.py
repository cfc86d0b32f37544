"""Topic overwriting from pictures to pairs, with a model that hallucinates in Shapes world."""

from __future__ import annotations

import json
import random
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mmalign import cli
from mmalign.config import (
    EndpointConfig,
    GenerationConfig,
    RoleConfig,
    SimilarityConfig,
    TopicCurriculumConfig,
    TopicOverwriteConfig,
)
from mmalign.data.files import write_jsonl
from mmalign.pipelines._topic_team import make_team
from mmalign.pipelines.topic_overwrite import overwrite_topics
from mmalign.randomness import derive_seed
from mmalign.shapes.hallucination import check_caption
from mmalign.shapes.parser import parse_image
from mmalign.shapes.questions import read_question
from mmalign.shapes.render import render
from mmalign.shapes.scene import COLORS, SHAPES, Scene, sample_scene
from mmalign.shapes.speech import SPOTS, Fact, write_caption
from mmalign.types import InputError, Question

CAPTION = "Describe this picture in detail."
SHAPES_WORLD = RoleConfig(backend="shapes")


class Hallucinator:
    """Sees the picture, invents objects, and answers one question in five wrongly."""

    fingerprint = "hallucinator"

    def __init__(self) -> None:
        self.calls = 0

    def generate(self, questions: Sequence[Question], config: GenerationConfig) -> list[str]:
        self.calls += len(questions)
        pictures = {id(question.images[0]): question.images[0] for question in questions}
        scenes = {key: parse_image(image).scene for key, image in pictures.items()}  # type: ignore[arg-type]
        answers = []
        seen: Counter[tuple[int, str]] = Counter()
        for question in questions:
            picture: Any = question.images[0]
            asked = (zlib.crc32(picture.tobytes()), question.prompt)
            rng = random.Random(derive_seed(config.seed, *asked, seen[asked]))
            seen[asked] += 1
            answers.append(self._answer(question.prompt, scenes[id(question.images[0])], rng))
        return answers

    def yes_no(self, questions: Sequence[Question], batch_size: int) -> list[tuple[float, float]]:
        raise AssertionError("the labeller of Shapes world is asked instead")

    def _answer(self, prompt: str, scene: Scene, rng: random.Random) -> str:
        seen = scene if rng.random() < 0.8 else sample_scene(rng)
        if prompt != CAPTION:
            return read_question(prompt).answer(seen)
        kept = [item for item in scene.objects if rng.random() < 0.9] or scene.objects[:1]
        invented = [self._invent(rng) for _ in range(rng.choice([0, 1, 1, 2]))]
        text = write_caption(Scene(objects=tuple(kept), background=seen.background), rng, invented)
        return text

    def _invent(self, rng: random.Random) -> Fact:
        shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
        return Fact(shape=shape, color=color, size="small", place=rng.choice(list(SPOTS)))


@pytest.fixture
def scenes(tmp_path: Path) -> list[Scene]:
    """Eight scenes of three objects; their pictures are in `pictures`."""
    rng = random.Random(3)
    made = [sample_scene(rng, num_objects=3) for _ in range(8)]
    (tmp_path / "pictures").mkdir()
    rows = []
    for number, scene in enumerate(made):
        render(scene).save(tmp_path / "pictures" / f"{number:02d}.png")
        rows.append({"image": f"pictures/{number:02d}.png", "prompt": CAPTION, "id": str(number)})
    write_jsonl(tmp_path / "questions.jsonl", rows)
    return made


@pytest.fixture
def config(tmp_path: Path, scenes: list[Scene]) -> Callable[..., TopicOverwriteConfig]:
    def make(**options: Any) -> TopicOverwriteConfig:
        config = TopicOverwriteConfig(
            **{
                "questions": str(tmp_path / "questions.jsonl"),
                "output_dir": str(tmp_path / "out"),
                "responses": 5,
                "min_topics": 2,
                "chunk": 4,
                "splitter": SHAPES_WORLD,
                "writer": SHAPES_WORLD,
                "judge": SHAPES_WORLD,
                "labeller": SHAPES_WORLD,
                "rewriter": SHAPES_WORLD,
                **options,
            }
        )
        config.similarity.threshold = 0.5
        return config

    return make


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., tuple[list[dict[str, Any]], dict[str, Any], int]]:
    """Run the pipeline; returns pairs, counts, and how often the model was asked."""

    def run(config: TopicOverwriteConfig) -> tuple[list[dict[str, Any]], dict[str, Any], int]:
        model = Hallucinator()
        counts = overwrite_topics(config, team=make_team(config, answerer=model))
        path = Path(config.output_dir) / "pairs.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return rows, counts, model.calls

    return run


def test_pairs_differ_in_truth_and_not_in_style(
    config: Any, build: Any, scenes: list[Scene], tmp_path: Path
) -> None:
    rows, counts, _ = build(config())
    assert counts == json.loads((tmp_path / "out" / "counts.json").read_text())
    assert counts["pairs"] == len(rows) >= 6
    assert counts["pairs"] + sum(counts["dropped"].values()) == counts["questions"] == 8
    edited = [row for row in rows if row["source"] == "topics/rewritten"]
    assert len(edited) >= 4
    hallucinated = {"chosen": 0, "rejected": 0}
    for row in rows:
        scene = scenes[int(row["pair_id"])]
        assert (tmp_path / "out" / row["image"]).is_file()
        assert row["score_chosen"] > row["score_rejected"]
        assert row["margin"] == row["score_chosen"] - row["score_rejected"]
        for side in hallucinated:
            hallucinated[side] += len(check_caption(scene, row[side]).hallucinated)
    assert hallucinated["chosen"] < 0.5 * hallucinated["rejected"]
    words = [[len(row[side].split()) for row in edited] for side in ("chosen", "rejected")]
    assert 0.8 < sum(words[0]) / sum(words[1]) < 1.25


def test_every_edit_is_what_the_picture_says(
    config: Any, build: Any, scenes: list[Scene], tmp_path: Path
) -> None:
    build(config())
    stages = tmp_path / "out" / "stages"
    seen = 0
    for line in (stages / "select.jsonl").read_text().splitlines():
        result = json.loads(line)["result"]
        for edit in result["chosen"]:
            assert (edit["old_score"], edit["new_score"]) == (-1.0, 1.0)
        for edit in result["rejected"]:
            assert (edit["old_score"], edit["new_score"]) == (1.0, -1.0)
        seen += len(result["chosen"]) + len(result["rejected"])
    assert seen > 10


def test_runs_end_alike_however_they_are_cut(
    config: Any, build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, _, calls = build(config(output_dir=str(tmp_path / "whole")))
    stages = [
        *("sample", "split", "ask", "resample", "verify", "score", "similarity", "judge"),
        *("cluster", "select", "rewrite", "rescore"),
    ]
    model = Hallucinator()
    for stage in stages:
        single = config(stage=stage)
        counts = overwrite_topics(single, team=make_team(single, answerer=model))
        assert "pairs" not in counts
    last, _, more = build(config(stage="pairs"))
    assert (model.calls, more) == (calls, 0)
    assert last == rows
    whole, parts = (tmp_path / name / "stages" for name in ("whole", "out"))
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == {
        p.name: p.read_bytes() for p in parts.iterdir()
    }
    page = (tmp_path / "out" / "topics.html").read_bytes()
    assert page == (tmp_path / "whole" / "topics.html").read_bytes()


def test_a_killed_run_goes_on(
    config: Any, build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, _, calls = build(config(output_dir=str(tmp_path / "whole")))
    generate, left = Hallucinator.generate, [2]

    def dying(self: Hallucinator, questions: Any, config: Any) -> list[str]:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return generate(self, questions, config)

    monkeypatch.setattr(Hallucinator, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        build(config())
    monkeypatch.setattr(Hallucinator, "generate", generate)
    again, _, more = build(config())
    assert again == rows
    assert more == calls - 2 * 4 * 5  # twice four questions had been saved


def test_until_ends_early(config: Any, tmp_path: Path) -> None:
    options = config(until="split")
    overwrite_topics(options, team=make_team(options, answerer=Hallucinator()))
    names = sorted(path.name for path in (tmp_path / "out" / "stages").iterdir())
    assert names == ["sample.jsonl", "split.jsonl"]
    assert not (tmp_path / "out" / "pairs.jsonl").exists()
    late = config(stage="verify")
    team = make_team(late, answerer=Hallucinator())
    with pytest.raises(InputError, match=r"question 0 is missing; run --until ask first"):
        overwrite_topics(late, team=team)


def test_curriculum_orders_pairs(config: Any, build: Any, scenes: list[Scene]) -> None:
    curriculum = TopicCurriculumConfig(enabled=True, warmup_share=0.5)
    rows, _, _ = build(config(curriculum=curriculum))
    places = [row["hardness"] for row in rows]
    assert places == sorted(places)
    assert 0.0 in places
    assert max(places) > 0.5


def test_authors_rules(config: Any, build: Any) -> None:
    rows, counts, _ = build(
        config(select="last_binary", template="min_edit", min_topics=3, on_bad_rewrite="fallback")
    )
    assert rows
    assert counts["pairs"] == len(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "split", "until": "split"}, "stage and until exclude each other"),
        ({"responses": 1}, "responses must be at least 2"),
        ({"sampling": GenerationConfig()}, r"sampling.temperature must be above 0"),
        (
            {"curriculum": TopicCurriculumConfig(enabled=True), "select": "last_binary"},
            "curriculum.enabled needs select extreme",
        ),
        ({"questions": ""}, "questions is required"),
        (
            {"fallback": "drop", "min_topics": 99, "limit": 1},
            r"no pairs: all 1 questions were .*\(1 x .*topics.html shows what was answered",
        ),
    ],
)
def test_options_that_make_no_pairs(options: Any, message: str, config: Any) -> None:
    wrong = config(**options)
    with pytest.raises(InputError, match=message):
        overwrite_topics(wrong, team=make_team(wrong, answerer=Hallucinator()))


def test_changed_clip_weights_are_another_test_of_similarity(config: Any, tmp_path: Path) -> None:
    (folder := tmp_path / "clip").mkdir()
    (folder / "weights").write_text("a")
    (file := tmp_path / "tuned.pt").write_text("a")
    for options, changed in (
        (SimilarityConfig(clip_model=str(folder)), folder / "weights"),
        (SimilarityConfig(clip_model="ViT-B-32", clip_pretrained=str(file)), file),
    ):
        before = make_team(config(similarity=options)).similarity.identity
        assert make_team(config(similarity=options)).similarity.identity == before
        changed.write_text("ab")
        assert make_team(config(similarity=options)).similarity.identity != before


def test_seeds_of_drawn_text_are_other_jobs(config: Any) -> None:
    def identities(temperature: float, seed: int) -> list[str]:
        how = GenerationConfig(temperature=temperature, seed=seed)
        own = dict.fromkeys(("splitter", "writer", "rewriter"), RoleConfig())
        team = make_team(config(model="own", language=how, rewriting=how, **own))
        return [team.splitter.identity, team.writer.identity, team.rewriter.identity]

    pairs = zip(identities(1.0, 0), identities(1.0, 1), strict=True)
    assert all(a != b for a, b in pairs)
    assert identities(0.0, 0) == identities(0.0, 1)  # nothing is drawn


def test_jobs_with_the_same_model_share_it(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    class Model(Hallucinator):
        pass

    def load(options: Any) -> Any:
        loaded.append(options.model)
        return Model()

    monkeypatch.setattr("mmalign.pipelines._topic_team._load", load)
    other = RoleConfig(backend="model")
    other.model.model = "another"
    options = config(model="own", judge=other, labeller=other, splitter=RoleConfig())
    team = make_team(options)
    own = team.answerer.worker()
    assert team.splitter.worker().model is own  # type: ignore[attr-defined]
    assert team.judge.worker().model is team.labeller.worker().model  # type: ignore[attr-defined]
    assert loaded == ["own", "another"]
    team.release()
    assert team.answerer.worker() is own
    team.judge.worker()
    assert loaded == ["own", "another", "another"]
    assert team.judge.identity == team.labeller.identity != team.splitter.identity
    assert team.writer.exact
    assert not team.judge.exact


def test_servers_must_be_described(config: Any) -> None:
    with pytest.raises(InputError, match="url and model_name are required"):
        make_team(config(judge=RoleConfig(backend="endpoint")))
    with pytest.raises(InputError, match="model is required"):
        make_team(config()).answerer.worker()
    served = config(endpoint=EndpointConfig(url="http://127.0.0.1:1/v1", model_name="m"))
    assert "http://127.0.0.1:1/v1" in make_team(served).answerer.identity


def test_changed_checkpoints_are_other_models(config: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    before = make_team(config(model=str(folder))).answerer.identity
    assert make_team(config(model=str(folder))).answerer.identity == before
    assert make_team(config(model=str(folder), device="cpu")).answerer.identity == before
    (folder / "config.json").write_text("{ }")
    assert make_team(config(model=str(folder))).answerer.identity != before


def test_server_that_is_down_is_one_line(
    config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(
        [
            *("pairs", "topics", str(tmp_path / "questions.jsonl")),
            *("--output_dir", str(tmp_path / "served"), "--responses", "2"),
            *("--endpoint.url", "http://127.0.0.1:9/v1", "--endpoint.model_name", "m"),
            *("--endpoint.retries", "0"),
        ]
    )
    assert code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "questions.jsonl line 1: endpoint m: http://127.0.0.1:9/v1/chat/completions" in line
    assert "cannot be reached" in line
