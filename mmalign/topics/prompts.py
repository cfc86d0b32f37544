"""What language models are asked, in words of this project."""

from __future__ import annotations

from collections.abc import Sequence

from mmalign.data.schema import content_hash
from mmalign.topics.facts import numbered
from mmalign.topics.types import Aspect, RewriteRequest, Statement

ANSWER_YES_OR_NO = "Answer with yes or no."

_SPLIT = """\
Below is what somebody said about a picture. List everything it claims about the picture as short \
separate statements.
- One statement holds one thing that can be checked by looking: that something is there, or one of \
its properties, its place, its number, what it does, or how it stands to something else.
- Every statement must be clear on its own: write the thing's name, not "it" or "they".
- Claim nothing that the text does not claim. Leave out moods, guesses and opinions.
Write one statement per line, each after "- ", and nothing else.

Text: {answer}

Statements:"""

_ASK = """\
Below are {count} numbered statements about a picture. For each one, write the question that it \
answers, beginning with what, which, where, who or how. The question names the thing that the \
statement is about but does not give away what the statement says of it.
Write exactly {count} lines, numbered like the statements, and nothing else.

Statements:
{facts}

Questions:"""

_VERIFY = """\
Below are {count} numbered statements about a picture. Turn each one into a question that is \
answered by yes exactly when the statement is true. Keep all of its details and add none. Where a \
statement says that something is not there, ask whether it is missing.
Write exactly {count} lines, numbered like the statements, and nothing else.

Statements:
{statements}

Questions:"""

_RESAMPLE = """\
{question}
Look at the picture and answer in one short, complete sentence of this form: {fact}"""

_SAME_FACT = """\
Two people describe the same picture.
First: {first}
Second: {second}
Are they talking about the same thing and the same one of its properties, whether or not they \
agree about it? """

_SAME_QUESTION = """\
Two questions were asked about the same picture.
First: {first}
Second: {second}
Do they ask for the same piece of information about the same thing? """

_REWRITE = """\
Here is a question about the picture, an answer to it, and corrections of that answer. Work every \
correction into the answer, even where the picture seems to say otherwise. Change nothing that the \
corrections do not touch, and keep the tone, the order and about the length. Write the new answer \
and nothing else.

Question: {question}
Answer: {answer}
Corrections:
{corrections}
New answer:"""

_ALL = (_SPLIT, _ASK, _VERIFY, _RESAMPLE, _SAME_FACT, _SAME_QUESTION, _REWRITE, ANSWER_YES_OR_NO)
FINGERPRINT = content_hash("\n".join(_ALL).encode()).hex()
"""Changes when any of them does, for cache keys."""


def split(answer: str) -> str:
    """Ask for the facts of an answer; the reply is a list."""
    return _SPLIT.format(answer=answer)


def ask(facts: Sequence[str]) -> str:
    """Ask for wh-questions about facts; the reply has numbered lines."""
    return _ASK.format(count=len(facts), facts=numbered(list(facts)))


def verify(statements: Sequence[Statement]) -> str:
    """Ask for yes/no questions about statements; the reply has numbered lines."""
    lines = [f"{s.text} (in reply to: {s.question})" if s.question else s.text for s in statements]
    return _VERIFY.format(count=len(lines), statements=numbered(lines))


def resample(question: str, fact: str) -> str:
    """Ask the model its own wh-question again."""
    return _RESAMPLE.format(question=question, fact=fact)


def same_topic(first: str, second: str, aspect: Aspect) -> str:
    """Ask whether two facts or questions are about one topic; the reply is yes or no."""
    form = _SAME_FACT if aspect == "fact" else _SAME_QUESTION
    return form.format(first=first, second=second) + ANSWER_YES_OR_NO


def rewrite(request: RewriteRequest) -> str:
    """Ask for an answer with its facts replaced."""
    corrections = numbered([f'not "{old}" but "{new}"' for old, new in request.edits])
    return _REWRITE.format(
        question=request.question.prompt, answer=request.answer, corrections=corrections
    )
