"""Scores of candidates, kept in a log per process so that scoring can stop and go on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmalign.data.files import read_jsonl, writing
from mmalign.data.images import decode, hash_image, to_tensor
from mmalign.data.schema import BadRow, RowError, content_hash
from mmalign.pipelines._cached import CachedReward, identify
from mmalign.pipelines._candidates import MAX_PIXELS, Candidate, Group
from mmalign.pipelines._image_batches import check_one_size
from mmalign.types import InputError

if TYPE_CHECKING:
    from mmalign.config import OnBadRow, RewardConfig
    from mmalign.types import Reward

FOLDER = "scores"


class Scored(NamedTuple):
    """Scores of a candidate by a reward's name in the log, or what is wrong with its image."""

    image_hash: str
    scores: Mapping[str, float]
    problem: str | None = None


class Scorer(NamedTuple):
    """Rewards by key: configured, loaded, and named in the logs by all that their scores depend on.

    `cache` is a folder of scores that other runs share.
    """

    configs: Mapping[str, RewardConfig]
    rewards: Mapping[str, Reward]
    log_keys: Mapping[str, str]
    device: str
    cache: str | None = None

    @classmethod
    def of(
        cls,
        configs: Mapping[str, RewardConfig],
        rewards: Mapping[str, Reward],
        device: str,
        cache: str | None = None,
    ) -> Scorer:
        """Name the rewards for the logs.

        Raises:
            InputError: if a file of a reward cannot be read.
        """
        names = {key: _log_key(key, rewards[key], config) for key, config in configs.items()}
        return cls(configs, rewards, names, device, cache)

    def knows(self, entry: Scored) -> bool:
        """Tell whether every reward has scored a candidate, or none can."""
        return entry.problem is not None or set(self.log_keys.values()) <= entry.scores.keys()

    def scores(self, entry: Scored) -> dict[str, float]:
        """Return the scores of a candidate that is known, by the rewards' keys."""
        return {key: entry.scores[name] for key, name in self.log_keys.items()}


class ScoreLog:
    """What is scored so far, by any process; each process appends to a file of its own."""

    def __init__(self, output: Path, num_shards: int, shard: int) -> None:
        """Read the logs of all processes."""
        self.folder = output / FOLDER
        self.file = self.folder / f"{shard:05d}-of-{num_shards:05d}.jsonl"
        self.known: dict[str, Scored] = {}
        self.read()

    def read(self) -> None:
        """Read all logs again; a line that is cut off does not count."""
        for file in sorted(self.folder.glob("*.jsonl")):
            for _, record in read_jsonl(file):
                if not isinstance(record, RowError):
                    self._keep(record)

    def append(self, entries: Mapping[str, Scored]) -> None:
        """Write entries and remember them.

        Raises:
            InputError: if the log cannot be written.
        """
        lines = [json.dumps({"name": name, **e._asdict()}) + "\n" for name, e in entries.items()]
        with writing(self.file):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab+") as stream:
                _end_line(stream)
                stream.write("".join(lines).encode())
        self.known.update(entries)

    def _keep(self, record: Mapping[str, Any]) -> None:
        try:
            scores = {str(key): float(value) for key, value in record["scores"].items()}
            entry = Scored(str(record["image_hash"]), scores, record["problem"])
        except (KeyError, TypeError, ValueError, AttributeError):
            return
        earlier = self.known.get(str(record["name"]))
        if earlier is not None and earlier.image_hash == entry.image_hash:
            entry = entry._replace(scores={**earlier.scores, **entry.scores})
        self.known[str(record["name"])] = entry


def reward_key(config: RewardConfig) -> str:
    """Name a reward for tables: options count, weight and normalization are applied later."""
    if not config.options:
        return config.name
    options = json.dumps(config.options, sort_keys=True, default=str)
    return f"{config.name}-{content_hash(options.encode()).hex()[:8]}"


def _log_key(key: str, reward: Reward, config: RewardConfig) -> str:
    """Name a reward so that what changes its scores changes the name."""
    identity = json.dumps(identify(reward, config), sort_keys=True, default=str)
    return f"{key}@{content_hash(identity.encode()).hex()[:16]}"


def score_groups(
    groups: Sequence[Group], scorer: Scorer, log: ScoreLog, on_bad_row: OnBadRow
) -> None:
    """Score the candidates that are not scored yet, or whose image or reward has changed.

    A batch never spans two prompts, so scores depend neither on how prompts are shared among
    processes nor on where an earlier run stopped.

    Raises:
        InputError: naming the image, for a score that is not a finite number, or an image that
            cannot be read under `stop`.
    """
    rewards: dict[str, CachedReward] = {}
    try:
        for group in tqdm(groups, desc="score candidates", unit="prompt"):
            hashes = [_hash(candidate, on_bad_row) for candidate in group]
            if all(_is_done(log, *each, scorer) for each in zip(group, hashes, strict=True)):
                continue
            if not rewards:
                rewards = {
                    scorer.log_keys[key]: CachedReward(reward, scorer.configs[key], scorer.cache)
                    for key, reward in scorer.rewards.items()
                }
            log.append(_score_group(group, hashes, rewards, scorer.device, on_bad_row))
    finally:
        for reward in rewards.values():
            reward.save()


def bad_images(groups: Sequence[Group], log: ScoreLog) -> list[BadRow]:
    """List the candidates whose image cannot be read."""
    candidates = [candidate for group in groups for candidate in group]
    return [
        BadRow(str(candidate.path), problem)
        for candidate in candidates
        if (problem := log.known[candidate.name].problem) is not None
    ]


def _is_done(log: ScoreLog, candidate: Candidate, image_hash: str, scorer: Scorer) -> bool:
    entry = log.known.get(candidate.name)
    return entry is not None and entry.image_hash == image_hash and scorer.knows(entry)


def _score_group(
    group: Group,
    hashes: Sequence[str],
    rewards: Mapping[str, CachedReward],
    device: str,
    on_bad_row: OnBadRow,
) -> dict[str, Scored]:
    entries: dict[str, Scored] = {}
    images: list[tuple[Candidate, str, Tensor]] = []
    for candidate, image_hash in zip(group, hashes, strict=True):
        try:
            image = to_tensor(decode(candidate.ref, MAX_PIXELS))
            images.append((candidate, image_hash, image))
        except RowError as error:
            if on_bad_row == "stop":
                raise InputError(f"{candidate.path}: {error}") from error
            entries[candidate.name] = Scored(image_hash, {}, str(error))
    scores = {key: _score(reward, images, device) for key, reward in rewards.items()}
    for index, (candidate, image_hash, _) in enumerate(images):
        values = {key: column[index] for key, column in scores.items()}
        entries[candidate.name] = Scored(image_hash, values)
    return entries


def _score(
    reward: CachedReward, images: Sequence[tuple[Candidate, str, Tensor]], device: str
) -> list[float]:
    """Score neighbors of the same shape together; all of them where they are compared."""
    if reward.scores_sets and images:
        prompt, tensors = images[0][0].prompt, [image for _, _, image in images]
        check_one_size([reward.name], prompt, tensors)
    scores: list[float] = []
    for _, same in groupby(images, key=lambda each: each[2].shape):
        batch = list(same)
        samples = torch.stack([image for _, _, image in batch]).to(device)
        prompts = [candidate.prompt for candidate, _, _ in batch]
        names = [str(candidate.path) for candidate, _, _ in batch]
        scores += reward(samples, prompts, names)
    return scores


def _hash(candidate: Candidate, on_bad_row: OnBadRow) -> str:
    try:
        return hash_image(candidate.ref).hex()
    except RowError as error:
        if on_bad_row == "stop":
            raise InputError(f"{candidate.path}: {error}") from error
        return ""


def _end_line(stream: Any) -> None:
    """Drop a last line that an earlier run did not finish."""
    stream.seek(0)
    data = stream.read()
    stream.truncate(data.rfind(b"\n") + 1)
    stream.seek(0, 2)
