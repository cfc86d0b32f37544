from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mmalign.pipelines.topic_overwrite import overwrite_topics


@pytest.fixture
def pages(config: Any, make_team: Any, world: Any, tmp_path: Path) -> Any:
    def make(**options: Any) -> str:
        settings = config(**{"min_topics": 1, **options})
        overwrite_topics(settings, team=make_team(world))
        return (tmp_path / "out" / "topics.html").read_text()

    return make


def test_page_shows_what_every_stage_made(pages: Any) -> None:
    page = pages()
    assert page.count('<article class="question">') == 5
    assert page.count("data:image/png;base64,") == 5
    for text in ("template", "overwritten", "What is the cat?", "resampled", "rewritten", "topics"):
        assert text in page


def test_page_needs_nothing_from_outside(pages: Any) -> None:
    page = pages()
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)


def test_text_of_models_and_users_is_escaped(pages: Any, world: Any, monkeypatch: Any) -> None:
    say = world._say
    hostile = "<img/src=x/onerror=alert(1)>"
    monkeypatch.setattr(world, "_say", lambda thing, draw: f"{say(thing, draw)[:-1]}{hostile}.")
    page = pages()
    assert hostile not in page
    assert "&lt;img/src=x/onerror=alert(1)&gt;" in page


@pytest.mark.parametrize("until", ["sample", "split", "score", "cluster", "select"])
def test_page_of_an_unfinished_run(until: str, pages: Any) -> None:
    page = pages(until=until)
    assert page.count('<article class="question">') == 5
    assert ("overwritten" in page) == (until == "select")
    assert ("topics</summary>" in page) == (until in ("cluster", "select"))


def test_of_many_questions_evenly_spaced_ones_are_shown(pages: Any) -> None:
    page = pages(count=9, page_questions=3)
    assert re.findall(r"questions.jsonl line (\d)", page) == ["1", "4", "7"]
