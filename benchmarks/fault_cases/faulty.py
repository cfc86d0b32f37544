"""Row 13: rewards that fail while a run trains, scores or evaluates."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .harness import Tally, case, from_tests, mmalign
from .toys import PROMPTS, TOYS, difference, png, write_lines

HERE = "fault_cases.rewards"
NAMED = "one line with reward, reason and sample; the steps before are saved"
ELSEWHERE = "one line with reward, reason and sample; nothing half done is written"
FAULTS = {
    "raises": ("failed for step", "RuntimeError: out of film"),
    "late": ("failed for step", "TimeoutError: no picture within 3 s"),
    "short": ("instead of", "scores for step"),
    "nan": ("returned nan for step",),
    "none": ("returned None for step",),
    "no_memory": ("runs out of memory on step",),
}


def fails(fault: str, folder: Path, tally: Tally) -> None:
    """Fail in the fourth call of every online method that takes any reward."""
    reward = f'[{{"name": "{HERE}:{fault}"}}]'
    for method in ("d3po", "tailorpo"):
        output = folder / method
        said = mmalign(*TOYS.train(method, output, f"--rewards={reward}"))
        words = (f"reward {HERE}:{fault} ", *FAULTS[fault])
        tally.refused(said, *words, "last good weights")
    options = f'{{"function": "{HERE}:{fault}", "differentiable": true}}'
    rewards = f'--rewards=[{{"name": "callable", "options": {options}}}]'
    said = mmalign(*TOYS.train("draft", folder / "draft", rewards))
    tally.refused(said, f"reward {fault} ", *FAULTS[fault], "last good weights")


for _fault in FAULTS:
    case(13, f"reward that fails: {_fault}", NAMED)(partial(fails, _fault))


@case(13, "rewards that fail in score, pairs build and evaluation", ELSEWHERE, limit=300)
def fails_elsewhere(folder: Path, tally: Tally) -> None:
    """Fail in the fourth call of every other command that asks rewards."""
    images, prompts, rows = _images(folder / "images", 6), folder / "prompts.txt", []
    for number in range(6):
        rows.append({"file_name": f"{number}.png", "prompt": PROMPTS[number // 2]})
    write_lines(images / "metadata.jsonl", rows)
    prompts.write_text("red\n" * 6)
    for fault, words in FAULTS.items():
        known = [word.removesuffix(" for step").removesuffix(" on step") for word in words]
        known = [f"{HERE}:{fault} ", *known]
        reward = f'[{{"name": "{HERE}:{fault}", "batch_size": 1}}]'
        place = folder / fault
        score = ["score", f"--images={images}", f"--prompts={prompts}", "--batch_size=1"]
        score += [f"--reward={HERE}:{fault}", f"--output={place / 'scores.parquet'}"]
        tally.refused(mmalign(*score), *known, "3.png")
        tally.point(not (place / "scores.parquet").exists(), f"{fault}: scores are written")
        build = ["pairs", "build", f"--images={images}", "--device=cpu", f"--rewards={reward}"]
        build += [f"--prompts={images / 'metadata.jsonl'}", f"--output={place / 'pairs'}"]
        tally.refused(mmalign(*build), *known, "3.png")
        found = (place / "pairs" / "metadata.jsonl").exists()
        tally.point(not found, f"{fault}: pairs are written")
        evaluation = (f"--evaluation.prompts={TOYS.prompts}", "--evaluation.every_steps=1")
        more = ("--evaluation.images_per_prompt=1", f"--evaluation.rewards={reward}")
        said = mmalign(*TOYS.train("mapo", place / "run", *evaluation, *more))
        tally.refused(said, *known)


def _images(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png((40 * number, 0, 0)))
    return folder


@case(13, "reward without memory for a batch", "halves the batch; the same result")
def halves(folder: Path, tally: Tally) -> None:
    """A reward that has memory for one image at a time gives what one with enough gives."""
    for method in ("d3po", "tailorpo"):
        small, whole = folder / f"{method}-small", folder / f"{method}-whole"
        said, enough = (
            mmalign(*TOYS.train(method, output, f'--rewards=[{{"name": "{HERE}:{name}"}}]'))
            for output, name in ((small, "memory"), (whole, "bright"))
        )
        assert enough.code == 0, enough.error
        warned = "out of memory with" in said.text
        problem = said.error if said.code else difference(whole, small)
        tally.point(warned and not problem, problem or "no warning")
    images = _images(folder / "images", len(PROMPTS))
    argv = ["score", f"--images={images}", f"--prompts={TOYS.prompts}"]
    output = f"--output={folder / 'scores.parquet'}"
    said = mmalign(*argv, output, f"--reward={HERE}:memory")
    tally.point(
        said.code == 0 and "out of memory with 3 samples at a time" in said.text, said.error
    )
    tally.answers = ["scored in halves with a warning; bitwise the same weights"]


from_tests(
    13,
    "programs and servers as rewards",
    NAMED,
    "tests/pipelines/test_online_faults.py",
    "tests/rewards/test_command.py",
    "tests/rewards/test_external.py",
    "tests/rewards/test_http.py",
)
