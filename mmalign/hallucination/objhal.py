"""Object HalBench as RLHF-V and RLAIF-V score it (arXiv 2312.00849, section 4.1).

Two variants. `rule` reads the objects from the answer itself by the closed vocabulary:
deterministic, offline, and what the official script does without its language model, up to
singulars. `endpoint` has a language model list the visible objects, and counts each word once
per answer.

The reported rate of responses is CHAIRs_refine: over the answers that mention any object, not
over all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from mmalign.hallucination.bootstrap import Counts, ratio
from mmalign.hallucination.captions import Caption
from mmalign.hallucination.chair import beside, caption_case, outcome_of, truth_of
from mmalign.hallucination.objects import Objects
from mmalign.hallucination.outcome import Case, Outcome
from mmalign.hallucination.vocabulary import Mention, Vocabulary

HEADLINE = {"chairs_refine": "CHAIRs refined", "chairi": "CHAIRi", "obj_rec": "object recall"}
SHORTEST = 4
"""Answers of fewer words than this are not sent to a language model: they name no objects."""
_FENCE = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)
PROMPT = """\
A model was asked about a picture. From its answer, list the things that it says can be seen.

Question: {question}
Answer: {answer}

Take the answer at its word. List only things that it names, each by its bare name without colour,
material, number or other properties. Leave out what it says is absent. Reply with one JSON list of
strings such as ["dog", "tennis racket"], and with [] if it names no visible thing."""


def evaluate(
    captions: Sequence[Caption],
    objects: Objects,
    vocabulary: Vocabulary,
    *,
    listed: Sequence[Sequence[str]] | None,
    seed: int,
    resamples: int,
) -> Outcome:
    """Score answers.

    Args:
        captions: answers.
        objects: truth by image.
        vocabulary: words of objects.
        listed: what a language model listed for each answer; None for the rule.
        seed: base seed of the intervals.
        resamples: draws of the intervals.

    Raises:
        InputError: naming the row, for an image whose objects are unknown.
    """
    cases: list[Case] = []
    for index, caption in enumerate(captions):
        if listed is None:
            mentions = vocabulary.mentions(caption.text)
        else:
            mentions = listed_mentions(listed[index], caption.text, vocabulary)
        cases.append(caption_case(caption, truth_of(caption, objects), mentions))
    return outcome_of("objhal", cases, scores, HEADLINE, seed=seed, resamples=resamples)


def scores(total: Counts) -> dict[str, float]:
    """Compute the metrics of the official result file, fractions and counts.

    `avg_word_len` counts what single spaces separate, so that a new paragraph hides a word;
    `length` counts words.
    """
    refined = ratio(total["hallucinated"], total["with_objects"])
    chair_i = ratio(total["absent"], total["mentions"])
    recall = ratio(total["covered"], total["truths"])
    shown = beside(total, recall)
    return {
        "chairs": ratio(total["hallucinated"], total["answers"]),
        "chairs_refine": refined,
        "chairi": chair_i,
        "obj_rec": recall,
        "correct_rate": 1 - refined,
        "object_correct_rate": 1 - chair_i,
        "sentence_num": total["answers"],
        "coco_sentence_num": total["with_objects"],
        "coco_word_count": total["covered"],
        "gt_word_count": total["truths"],
        "avg_word_len": ratio(total["parts"], total["answers"]),
        **shown,
    }


def request_for(caption: Caption) -> str | None:
    """Write what a language model is asked; None for answers too short to name objects."""
    if len(caption.text.split()) < SHORTEST:
        return None
    return PROMPT.format(question=caption.question, answer=caption.text)


def parse_objects(reply: str) -> list[str]:
    """Read the list of objects in a language model's reply: fenced, or from the first `[` on.

    Raises:
        ValueError: saying what is wrong, if there is no list of texts.
    """
    fence = _FENCE.search(reply)
    text = fence[1] if fence else reply[max(reply.find("["), 0) : reply.rfind("]") + 1]
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, list) or not all(isinstance(item, str) for item in content):
        raise ValueError("the reply has no JSON list of object names")
    return content


def listed_mentions(names: Sequence[str], answer: str, vocabulary: Vocabulary) -> list[Mention]:
    """Turn listed names into mentions, each word once; names of no object are left out.

    Of a name of several words the phrase that the vocabulary has counts, else its last word: the
    official script gets there by part-of-speech tags of a spaCy model.
    """
    found: dict[str, Mention] = {}
    for name in names:
        inside = vocabulary.mentions(name)
        phrases = [mention for mention in inside if " " in mention.word]
        last = [mention for mention in inside if mention.stop == len(name.rstrip())]
        for mention in phrases or last:
            if mention.word not in found:
                start = answer.lower().find(name.lower())
                stop = start + len(name) if start >= 0 else 0
                found[mention.word] = mention._replace(start=max(start, 0), stop=stop)
    return sorted(found.values(), key=lambda mention: mention.start)
