from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mmalign.config import PairsBuildConfig, RewardConfig, SamplingConfig
from mmalign.data.images import save_png
from mmalign.data.schema import CHOSEN_FILE, REJECTED_FILE
from mmalign.pipelines import _candidates, pairs_build
from mmalign.pipelines.pairs_build import build_pairs
from mmalign.randomness import derive_seed
from mmalign.types import InputError

PROMPTS = ["a red ball", "a blue cube", "two cats", "a dog", "nothing"]


class FakeSampler:
    """Every image is a function of its prompt and seed, as the protocol promises."""

    def __init__(self) -> None:
        self.sampled: list[tuple[str, int]] = []
        self.batches: list[int] = []
        self.stop_after: int | None = None

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: SamplingConfig
    ) -> Tensor:
        if self.stop_after is not None and len(self.sampled) >= self.stop_after:
            raise KeyboardInterrupt
        self.sampled += zip(prompts, seeds, strict=True)
        self.batches.append(len(prompts))
        images = []
        for seed in seeds:
            level = torch.rand((), generator=torch.Generator().manual_seed(seed))
            images.append(torch.ones(3, 6, 6) * level)
        return torch.stack(images)


class Brightness:
    name = "fake-brightness"
    modality = "image"
    differentiable = True
    range = (0.0, 1.0)

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        self.batches.append(list(prompts))
        return samples.mean((1, 2, 3))


@pytest.fixture
def config(tmp_path: Path) -> PairsBuildConfig:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return PairsBuildConfig(
        prompts=str(tmp_path / "prompts.txt"),
        output=str(tmp_path / "out"),
        candidates_per_prompt=3,
        sampling=SamplingConfig(batch_size=4, seed=7),
        device="cpu",
    )


def build(config: PairsBuildConfig, adapter: Any = None, reward: Any = None) -> Any:
    adapter, reward = adapter or FakeSampler(), reward or Brightness()
    return build_pairs(config, adapter=adapter, reward=reward)


def metadata(config: PairsBuildConfig) -> list[dict[str, Any]]:
    lines = (Path(config.output) / "metadata.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_best_and_worst_of_each_prompt(config: PairsBuildConfig) -> None:
    adapter = FakeSampler()
    table = build(config, adapter)
    assert [pair.prompt for pair in table.pairs] == PROMPTS
    assert (table.ties, table.bad_rows) == (0, [])
    expected = [(p, derive_seed(7, p, i)) for p in PROMPTS for i in range(3)]
    assert adapter.sampled == expected
    assert adapter.batches == [4, 4, 4, 3]
    output = Path(config.output)
    for row in metadata(config):
        folder = (output / row[CHOSEN_FILE]).parent
        levels = {p.name: Image.open(p).getpixel((0, 0))[0] for p in folder.iterdir()}  # type: ignore[index]
        assert len(levels) == 3
        assert levels[Path(row[CHOSEN_FILE]).name] == max(levels.values())
        assert levels[Path(row[REJECTED_FILE]).name] == min(levels.values())
        assert row["margin"] == row["score_chosen"] - row["score_rejected"] > 0
    scores = (output / "scores.jsonl").read_text().splitlines()
    assert len(scores) == 15
    assert json.loads(scores[4])["prompt"] == "a blue cube"


@pytest.mark.parametrize(
    ("options", "count"),
    [({"rule": "all_pairs"}, 15), ({"rule": "top_k", "top_k": 2}, 5)],
)
def test_other_rules(config: PairsBuildConfig, options: dict[str, Any], count: int) -> None:
    for name, value in options.items():
        setattr(config, name, value)
    assert len(build(config).pairs) == count


def test_min_gap(config: PairsBuildConfig) -> None:
    build(config)
    margins = sorted(row["margin"] for row in metadata(config))
    config.min_gap = (margins[2] + margins[1]) / 2
    table = build(config)
    assert (len(table.pairs), table.ties) == (3, 2)
    config.min_gap = 2
    with pytest.raises(InputError, match=r"no pairs: .*min_gap 2"):
        build(config)


def test_shards_give_the_same_pairs(config: PairsBuildConfig, tmp_path: Path) -> None:
    build(config)
    expected = (Path(config.output) / "metadata.jsonl").read_bytes()
    for order in ((0, 1), (1, 0)):
        config.output = str(tmp_path / f"sharded-{order[0]}")
        config.num_shards = 2
        config.shard = order[0]
        first = FakeSampler()
        assert len(build(config, first).pairs) == 0
        assert not (Path(config.output) / "metadata.jsonl").exists()
        assert {prompt for prompt, _ in first.sampled} == set(PROMPTS[order[0] :: 2])
        config.shard = order[1]
        assert len(build(config).pairs) == 5
        assert (Path(config.output) / "metadata.jsonl").read_bytes() == expected


def test_nothing_is_done_twice(config: PairsBuildConfig) -> None:
    build(config)
    before = (Path(config.output) / "metadata.jsonl").read_bytes()
    adapter, reward = FakeSampler(), Brightness()
    build(config, adapter, reward)
    assert (adapter.sampled, reward.batches) == ([], [])
    assert (Path(config.output) / "metadata.jsonl").read_bytes() == before


def test_interrupted_sampling_goes_on(config: PairsBuildConfig, tmp_path: Path) -> None:
    adapter = FakeSampler()
    adapter.stop_after = 8
    with pytest.raises(KeyboardInterrupt):
        build(config, adapter)
    again = FakeSampler()
    build(config, again)
    assert adapter.sampled + again.sampled == [
        (p, derive_seed(7, p, i)) for p in PROMPTS for i in range(3)
    ]
    resumed = (Path(config.output) / "metadata.jsonl").read_bytes()
    config.output = str(tmp_path / "whole")
    build(config)
    assert (Path(config.output) / "metadata.jsonl").read_bytes() == resumed


def test_damaged_and_missing_candidates_are_sampled_and_scored_again(
    config: PairsBuildConfig,
) -> None:
    build(config)
    before = (Path(config.output) / "metadata.jsonl").read_bytes()
    first, second, *_ = sorted((Path(config.output) / "candidates").rglob("*.png"))
    first.write_bytes(first.read_bytes()[:30])
    second.unlink()
    adapter = FakeSampler()
    build(config, adapter)
    assert len(adapter.sampled) == 2
    assert (Path(config.output) / "metadata.jsonl").read_bytes() == before


def test_changed_candidate_is_scored_again(config: PairsBuildConfig) -> None:
    build(config)
    worst = Path(config.output) / metadata(config)[0][REJECTED_FILE]
    save_png(torch.ones(3, 6, 6), worst)
    reward = Brightness()
    build(config, FakeSampler(), reward)
    assert reward.batches == [[PROMPTS[0]] * 3]
    assert metadata(config)[0][CHOSEN_FILE] == str(worst.relative_to(config.output))


def test_interrupted_scoring_goes_on(config: PairsBuildConfig) -> None:
    class Stops(Brightness):
        def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
            if len(self.batches) == 2:
                raise KeyboardInterrupt
            return super().__call__(samples, prompts)

    with pytest.raises(KeyboardInterrupt):
        build(config, None, Stops())
    (log,) = (Path(config.output) / "scores").iterdir()
    with log.open("ab") as stream:
        stream.write(b'{"name": "cut off')
    reward = Brightness()
    assert len(build(config, None, reward).pairs) == 5
    assert reward.batches == [[prompt] * 3 for prompt in PROMPTS[2:]]
    assert all(json.loads(line) for line in log.read_text().splitlines())


@pytest.mark.parametrize("bad", [float("nan"), None])
def test_bad_reward_names_the_image(config: PairsBuildConfig, bad: float | None) -> None:
    class Bad(Brightness):
        def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Any:
            values: list[float | None] = [0.5] * len(prompts)
            if prompts[0] == PROMPTS[1]:
                values[2] = bad
            return values

    with pytest.raises(InputError, match=r"fake-brightness returned .* for .*/002\.png"):
        build(config, None, Bad())
    assert not (Path(config.output) / "metadata.jsonl").exists()


def test_nan_image_is_named(config: PairsBuildConfig) -> None:
    class Broken(FakeSampler):
        def sample(self, *args: Any) -> Tensor:
            return super().sample(*args) * float("nan")

    with pytest.raises(InputError, match=r"000\.png: the image has pixels that are not finite"):
        build(config, Broken())


def test_other_settings_are_not_mixed(config: PairsBuildConfig) -> None:
    build(config)
    config.sampling.batch_size = 2
    config.candidates_per_prompt = 4
    adapter = FakeSampler()
    build(config, adapter)
    assert len(adapter.sampled) == 5
    config.sampling.guidance_scale = 9.0
    with pytest.raises(
        InputError, match=r"sampling\.guidance_scale 5\.0, not 9\.0: choose another"
    ):
        build(config)


def test_retrained_adapter_of_the_same_name_is_not_mixed(
    config: PairsBuildConfig, tmp_path: Path
) -> None:
    (tmp_path / "lora").mkdir()
    weights = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    weights.write_bytes(b"one")
    config.adapter = str(tmp_path / "lora")
    build(config)
    weights.write_bytes(b"two")
    with pytest.raises(InputError, match="candidates sampled with adapter_files"):
        build(config)


def test_same_picture_twice_makes_no_pair_twice(config: PairsBuildConfig) -> None:
    class Coarse(FakeSampler):
        def sample(self, *args: Any) -> Tensor:
            return super().sample(*args).round()

    config.rule = "all_pairs"
    table = build(config, Coarse())
    assert len(table.pairs) + table.ties == len(PROMPTS)
    assert len(table.pairs) > 0


def test_repeated_prompt_counts_once(
    config: PairsBuildConfig, caplog: pytest.LogCaptureFixture
) -> None:
    Path(config.prompts).write_text("a\nb\na\n")
    assert [pair.prompt for pair in build(config).pairs] == ["a", "b"]
    assert "1 prompts occur more than once" in caplog.text


def test_rewards_of_the_configuration(
    config: PairsBuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    class Negative(Brightness):
        def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
            return -super().__call__(samples, prompts)

    def load(reward: RewardConfig, device: str) -> Brightness:
        loaded.append(reward.name)
        return Negative() if reward.name == "dark" else Brightness()

    monkeypatch.setattr(pairs_build, "load_reward", load)
    config.rewards = [
        RewardConfig(name="bright", weight=1.0),
        RewardConfig(name="dark", weight=3.0, options={"x": 1}),
        RewardConfig(name="judge", eval_only=True),
    ]
    build_pairs(config, adapter=FakeSampler())  # type: ignore[arg-type]
    assert loaded == ["bright", "dark", "judge"]
    row = metadata(config)[0]
    chosen, rejected = (
        Image.open(Path(config.output) / row[key]).getpixel((0, 0))[0]  # type: ignore[index]
        for key in (CHOSEN_FILE, REJECTED_FILE)
    )
    assert chosen < rejected
    assert row["score_chosen"] == pytest.approx(chosen / 255 * (1 - 3), abs=1e-5)
    log = Path(config.output) / "scores" / "00000-of-00001.jsonl"
    before = log.read_bytes()
    config.rewards[1].weight = 0.5  # other weights need no new scores
    build_pairs(config, adapter=FakeSampler())  # type: ignore[arg-type]
    assert log.read_bytes() == before
    assert metadata(config)[0][CHOSEN_FILE] == row[REJECTED_FILE]
    config.rewards = config.rewards[2:]
    with pytest.raises(InputError, match="rewards is empty"):
        build_pairs(config, adapter=FakeSampler())  # type: ignore[arg-type]


def test_no_model_is_loaded_when_nothing_is_missing(
    config: PairsBuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def load(*_: Any, **options: Any) -> FakeSampler:
        calls.append(options)
        return FakeSampler()

    monkeypatch.setattr(pairs_build, "load_adapter", load)
    for _ in range(2):
        build_pairs(config, reward=Brightness())  # type: ignore[arg-type]
    assert calls == [{"device": "cpu", "for_training": False}]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"prompts": ""}, "prompts is missing"),
        ({"shard": 2, "num_shards": 2}, "shard 2 is not in"),
        ({"candidates_per_prompt": 1}, "at least 2"),
        ({"min_gap": -1.0}, "min_gap"),
    ],
)
def test_bad_options(config: PairsBuildConfig, options: dict[str, Any], problem: str) -> None:
    for name, value in options.items():
        setattr(config, name, value)
    with pytest.raises(InputError, match=problem):
        build(config)


@pytest.fixture
def existing(config: PairsBuildConfig, tmp_path: Path) -> PairsBuildConfig:
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    rows = []
    for number in range(6):
        name = f"deep/{number}.png" if number % 2 else f"{number}.jpg"
        size = (8, 8) if number < 4 else (6 + number, 8)
        Image.new("RGB", size, (40 * number,) * 3).save(folder / name)
        rows.append({"file_name": name, "prompt": f"prompt {number % 2}"})
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config.images = str(folder)
    config.prompts = str(folder / "prompts.jsonl")
    return config


def test_existing_images(existing: PairsBuildConfig) -> None:
    table = build(existing)
    output = Path(existing.output)
    assert [pair.prompt for pair in table.pairs] == ["prompt 0", "prompt 1"]
    rows = metadata(existing)
    assert [Path(row[CHOSEN_FILE]).suffix for row in rows] == [".jpg", ".png"]
    source = Path(str(existing.images))
    assert (output / rows[0][CHOSEN_FILE]).read_bytes() == (source / "4.jpg").read_bytes()
    assert (output / rows[1][REJECTED_FILE]).read_bytes() == (source / "deep/1.png").read_bytes()
    assert not (output / "candidates").exists()


def test_existing_images_inside_the_output_are_not_copied(existing: PairsBuildConfig) -> None:
    existing.output = str(existing.images)
    build(existing)
    assert metadata(existing)[0][CHOSEN_FILE] == "4.jpg"
    assert not (Path(existing.output) / "images").exists()


def test_unreadable_existing_image(existing: PairsBuildConfig) -> None:
    (Path(str(existing.images)) / "deep" / "5.png").write_bytes(b"text")
    with pytest.raises(InputError, match=r"5\.png: not an image"):
        build(existing)
    existing.on_bad_row = "skip"
    table = build(existing)
    assert [bad.where.rpartition("/")[2] for bad in table.bad_rows] == ["5.png"]
    assert len(table.pairs) == 2
    assert len(build(existing).bad_rows) == 1


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"file_name": "../secret.png", "prompt": "x"}', "'..' is not allowed"),
        ('{"file_name": "no.png", "prompt": "x"}', "does not exist"),
        ('{"file_name": "0.jpg", "prompt": "x"}', "named a second time"),
        ('{"file_name": "0.jpg", "prompt": ""}', "prompt is empty"),
        ('{"filename": "0.jpg", "prompt": "x"}', "the nearest present is 'filename'"),
        ("{", "not JSON"),
    ],
)
def test_bad_lines_of_the_prompt_file(existing: PairsBuildConfig, line: str, problem: str) -> None:
    file = Path(existing.prompts)
    file.write_text(file.read_text() + "\n" + line)
    with pytest.raises(InputError, match=rf"prompts\.jsonl line 7: .*{problem}"):
        build(existing)
    existing.on_bad_row = "skip"
    table = build(existing)
    assert (len(table.pairs), len(table.bad_rows)) == (2, 1)


def test_run_reports(
    config: PairsBuildConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pairs_build, "load_adapter", lambda *_, **__: FakeSampler())
    monkeypatch.setattr(pairs_build, "load_reward", lambda *_: Brightness())
    config.num_shards = 2
    pairs_build.run(config)
    assert "process 0 of 2 is done; others are not yet" in capsys.readouterr().out
    config.shard = 1
    pairs_build.run(config)
    assert "5 pairs in " in capsys.readouterr().out


def test_disk_full(config: PairsBuildConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(InputError, match=r"cannot write .*\.png: No space left on device"):
        build(config)
    monkeypatch.undo()
    assert len(build(config).pairs) == 5
    shutil.rmtree(Path(config.output) / _candidates.FOLDER)


def by_hand(images: Tensor, prompts: Sequence[str], channel: int = 0) -> Tensor:
    """Score by one channel of the first pixel."""
    return images[:, channel, 0, 0]


def channel(number: int, **more: Any) -> RewardConfig:
    return RewardConfig(name=f"{__name__}:by_hand", options={"channel": number}, **more)


@pytest.fixture
def colors(config: PairsBuildConfig, tmp_path: Path) -> PairsBuildConfig:
    """Three pictures of one prompt whose red, green and blue disagree."""
    rows = {"a": (200, 50, 0), "b": (100, 50, 255), "c": (150, 20, 100)}
    for name, color in rows.items():
        Image.new("RGB", (6, 6), color).save(tmp_path / f"{name}.png")
    table = [json.dumps({"file_name": f"{name}.png", "prompt": "p"}) for name in rows]
    (tmp_path / "table.jsonl").write_text("\n".join(table))
    config.images, config.prompts = str(tmp_path), str(tmp_path / "table.jsonl")
    return config


def chosen(config: PairsBuildConfig) -> set[tuple[str, str]]:
    """Name the pairs by the red of their sides."""
    names = {200: "a", 100: "b", 150: "c"}
    found = set()
    for row in metadata(config):
        sides = [Image.open(Path(config.output) / row[key]) for key in (CHOSEN_FILE, REJECTED_FILE)]
        found.add(tuple(names[int(side.convert("RGB").getpixel((0, 0))[0])] for side in sides))
    return found


def test_pareto_pairs(colors: PairsBuildConfig) -> None:
    colors.rewards, colors.rule = [channel(0), channel(1)], "pareto"
    build_pairs(colors)
    assert chosen(colors) == {("a", "b"), ("a", "c")}


def test_pareto_turns_rewards_of_negative_weight(colors: PairsBuildConfig) -> None:
    colors.rewards, colors.rule = [channel(0), channel(1, weight=-1.0)], "pareto"
    build_pairs(colors)
    assert chosen(colors) == {("a", "b"), ("c", "b")}


def test_eval_only_rewards_are_written_down_but_choose_nothing(colors: PairsBuildConfig) -> None:
    colors.rewards = [channel(0), channel(2, eval_only=True, weight=100.0)]
    build_pairs(colors)
    assert chosen(colors) == {("a", "b")}
    lines = (Path(colors.output) / "scores.jsonl").read_text().splitlines()
    scores = {row["file_name"]: row for row in map(json.loads, lines)}
    (blue,) = [
        key for key in scores["b.png"] if key.startswith(__name__) and scores["b.png"][key] == 1.0
    ]
    assert scores["b.png"]["score"] == pytest.approx(100 / 255)
    assert scores["a.png"][blue] == 0.0
    (Path(colors.output) / "metadata.jsonl").unlink()
    colors.rule = "pareto"
    build_pairs(colors)
    assert chosen(colors) == {("a", "b"), ("a", "c"), ("c", "b")}


def test_only_eval_only_rewards_rank_nothing(colors: PairsBuildConfig) -> None:
    colors.rewards = [channel(0, eval_only=True)]
    with pytest.raises(InputError, match="at least one reward must rank"):
        build_pairs(colors)


def test_gdpo_ranks_within_prompts_and_spreads_over_all(colors: PairsBuildConfig) -> None:
    colors.rewards, colors.combine = [channel(0), channel(2, weight=0.1)], "gdpo"
    build_pairs(colors)
    lines = (Path(colors.output) / "scores.jsonl").read_text().splitlines()
    scores = torch.tensor([json.loads(line)["score"] for line in lines])
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(scores.std(correction=0)) == pytest.approx(1.0, abs=1e-6)


counted: list[int] = []


def count(images: Tensor, prompts: Sequence[str]) -> Tensor:
    counted.append(len(images))
    return images.mean((1, 2, 3))


def test_scores_are_shared_with_other_runs(config: PairsBuildConfig, tmp_path: Path) -> None:
    counted.clear()
    config.rewards, config.cache = [RewardConfig(name=f"{__name__}:count")], str(tmp_path / "cache")
    build_pairs(config, adapter=FakeSampler())  # type: ignore[arg-type]
    assert sum(counted) == 15
    before = (Path(config.output) / "metadata.jsonl").read_bytes()
    config.output = str(tmp_path / "again")
    build_pairs(config, adapter=FakeSampler())  # type: ignore[arg-type]
    assert sum(counted) == 15
    assert (Path(config.output) / "metadata.jsonl").read_bytes() == before
