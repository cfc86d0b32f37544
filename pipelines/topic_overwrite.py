"""`mmalign pairs topics`: preference pairs that a model makes of its own answers.

The stages of `mmalign.topics`, in order, each with its file in `stages/`. They can be run one by
one, go on where an earlier run stopped, and do again only what depends on something that changed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from mmalign.config import as_path
from mmalign.pipelines._topic_team import make_team
from mmalign.topics.editing import Rescore, Rewrite, Select
from mmalign.topics.grouping import Cluster, Judge, Similarity
from mmalign.topics.page import write_page
from mmalign.topics.pairs import COUNTS, PAGE, PAIRS, write_counts, write_pairs
from mmalign.topics.questions import read_questions
from mmalign.topics.rewriting import hardness
from mmalign.topics.runner import load_stage, losses, recall_stage, run_stage
from mmalign.topics.similarity import window_offsets
from mmalign.topics.stages import Ask, Resample, Sample, Score, Split, Stage, Verify
from mmalign.topics.team import Cost, Team
from mmalign.types import InputError

if TYPE_CHECKING:
    from mmalign.config import TopicOverwriteConfig
    from mmalign.topics.items import Item

STAGES = "stages"
FINAL = "pairs"
LEAST_YES_NO = 0.5
GUESSED_FACTS = 5
"""Facts per answer that the estimate for the whole run assumes."""

logger = logging.getLogger(__name__)


def run(config: TopicOverwriteConfig) -> None:
    """Build pairs and say how many.

    Raises:
        InputError: as `overwrite_topics`.
    """
    counts = overwrite_topics(config)
    folder = as_path(config.output_dir)
    for reason, number in counts["dropped"].items():
        tqdm.write(f"dropped {number} questions: {reason}")
    for reason, number in counts["lost"].items():
        tqdm.write(f"left out {number} {reason}")
    if "pairs" in counts:
        ways = ", ".join(f"{number} {way}" for way, number in counts["sources"].items())
        tqdm.write(
            f"{counts['pairs']} pairs ({ways}) in {folder / PAIRS}; counts in {folder / COUNTS}"
        )
    tqdm.write(f"page: {folder / PAGE}")


def overwrite_topics(config: TopicOverwriteConfig, *, team: Team | None = None) -> dict[str, Any]:
    """Run the stages that are asked for.

    Args:
        config: questions, model, who does what, and the rules.
        team: who does what, instead of what `config` says.

    Returns:
        What was dropped and left out, by reason; and, once they are written, the number of pairs
        by source.

    Raises:
        InputError: if options or questions are unusable, an earlier stage is missing under `stage`,
            a model or an endpoint fails, or no pair results; naming file and row where there is
            one.
    """
    _check(config)
    items, bad_rows = read_questions(config)
    places = _curriculum(config, items)
    stages = make_stages(team or make_team(config), config, places)
    folder = as_path(config.output_dir)
    _say_estimate(config, stages, len(items))
    wanted = config.stage or config.until or FINAL
    for stage in stages:
        if config.stage not in (None, stage.name):
            load_stage(stage, items, folder / STAGES)
        else:
            run_stage(stage, items, folder / STAGES)
            stage.team.release()
        if stage.name == "score":
            _doubt_labeller(items)
        if stage.name == wanted:
            break
    counts: dict[str, Any] = losses(items)
    try:
        if wanted == FINAL:
            rows = write_pairs(items, folder, places)
            counts = write_counts(items, bad_rows, rows, folder)
    finally:
        _show(config, stages, items, folder, counts)
    return counts


def make_stages(
    team: Team, config: TopicOverwriteConfig, places: Mapping[str, float]
) -> list[Stage]:
    """List the stages in order; `pairs`, which writes what they found, comes after them."""
    return [
        Sample(team, config),
        Split(team, config),
        Ask(team, config),
        Resample(team, config),
        Verify(team, config),
        Score(team, config),
        Similarity(team, config),
        Judge(team, config),
        Cluster(team, config),
        Select(team, config, places),
        Rewrite(team, config),
        Rescore(team, config),
    ]


def _check(config: TopicOverwriteConfig) -> None:
    if not config.questions:
        raise InputError("questions is required: a .jsonl, a LLaVA .json or a folder of images")
    if config.stage is not None and config.until is not None:
        raise InputError("stage and until exclude each other: one stage, or all up to one")
    if config.responses < 2:
        raise InputError(f"responses must be at least 2, got {config.responses}")
    if not config.sampling.temperature > 0:
        raise InputError("sampling.temperature must be above 0, or all answers are the same")
    if config.curriculum.enabled and config.select != "extreme":
        raise InputError("curriculum.enabled needs select extreme: it orders candidates by score")


def _curriculum(config: TopicOverwriteConfig, items: Sequence[Item]) -> dict[str, float]:
    if not config.curriculum.enabled:
        return {}
    share = config.curriculum.warmup_share
    return hardness([item.id for item in items], warmup_share=share, seed=config.seed)


def _say_estimate(config: TopicOverwriteConfig, stages: Sequence[Stage], questions: int) -> None:
    """Guess the cost of a whole run before anything is loaded; every stage says its own later."""
    if config.stage is not None:
        return
    team, answers = stages[0].team, config.responses
    facts = answers * GUESSED_FACTS
    text = (1 - team.splitter.exact) * answers + (1 - team.writer.exact) * 3 * answers
    text += answers + facts * config.resamples
    checks = (1 - team.labeller.exact) * facts * (1 + config.resamples)
    text += (1 - team.rewriter.exact) * 2
    windows = config.similarity
    crops = len(window_offsets(windows.window, windows.step)) ** 2
    logger.info(
        "%s questions; a whole run from nothing costs about %s (%s facts per answer assumed), and"
        " yes/no questions to the judge for what CLIP lets through",
        f"{questions:,}",
        Cost(questions * text, questions * checks, questions * crops),
        GUESSED_FACTS,
    )


def _doubt_labeller(items: Sequence[Item]) -> None:
    """Warn of a labeller that wants to say something else than yes or no."""
    shares = [
        right + wrong
        for item in items
        for facts in item.results.get("score", {}).get("scores", [])
        for score in facts
        for right, wrong in (score["fact"], *score["resampled"])
    ]
    if shares and sum(shares) / len(shares) < LEAST_YES_NO:
        logger.warning(
            "labeller: it gives yes and no together %.2g of the probability on average, so it does"
            " not answer yes/no questions; scores and pairs mean little",
            sum(shares) / len(shares),
        )


def _show(
    config: TopicOverwriteConfig,
    stages: Sequence[Stage],
    items: Sequence[Item],
    folder: Path,
    counts: Mapping[str, Any],
) -> None:
    """Write the page with whatever is known, also of stages that were not run this time."""
    for stage in stages:
        if not any(stage.name in item.results for item in items):
            recall_stage(stage, items, folder / STAGES)
    shown = {"sources": {}, **counts}
    write_page(
        items, folder, counts=shown, shown=config.page_questions, max_pixels=config.max_pixels
    )
