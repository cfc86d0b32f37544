"""Row 13: rewards that fail while a run trains, scores or evaluates."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .harness import Tally, case, from_tests, mmalign
from .toys import PROMPTS, TOYS, png, weights

NAMED = "one line with reward, reason and sample; the steps before are saved"
FAULTS = {
    "raises": ("failed for step", "RuntimeError: out of film"),
    "late": ("failed for step", "TimeoutError: no picture within 3 s"),
    "short": ("instead of", "scores for step"),
    "nan": ("returned nan for step",),
    "none": ("returned None for step",),
    "no_memory": ("for step", "memory"),
}


def fails(fault: str, folder: Path, tally: Tally) -> None:
    """Fail in the fourth call of every online method that takes any reward."""
    reward = f'[{{"name": "fault_cases.rewards:{fault}"}}]'
    for method in ("d3po", "tailorpo"):
        output = folder / method
        said = mmalign(*TOYS.train(method, output, f"--rewards={reward}"))
        tally.refused(said, f"reward {fault}", *FAULTS[fault], "last good weights")
    options = f'{{"function": "fault_cases.rewards:{fault}", "differentiable": true}}'
    rewards = f'--rewards=[{{"name": "callable", "options": {options}}}]'
    said = mmalign(*TOYS.train("draft", folder / "draft", rewards))
    tally.refused(said, f"reward {fault}", "last good weights")


for _fault in FAULTS:
    case(13, f"reward that fails: {_fault}", NAMED)(partial(fails, _fault))


@case(13, "reward without memory for a batch", "halves the batch; the same result")
def halves(folder: Path, tally: Tally) -> None:
    """A reward that has memory for one image at a time gives what one with enough gives."""
    for method in ("d3po", "tailorpo"):
        small, whole = folder / f"{method}-small", folder / f"{method}-whole"
        said = mmalign(
            *TOYS.train(method, small, '--rewards=[{"name": "fault_cases.rewards:memory"}]')
        )
        mmalign(*TOYS.train(method, whole))
        problem = said.error if said.code else ""
        if not problem:
            first, second = weights(small), weights(whole)
            same = all(bool((first[k] == second[k]).all()) for k in first)
            problem = "" if same else "other weights"
        tally.point(not problem, problem)
    images = folder / "images"
    images.mkdir()
    for number in range(len(PROMPTS)):
        (images / f"{number}.png").write_bytes(png((80 * number, 0, 0)))
    argv = ["score", f"--images={images}", f"--prompts={TOYS.prompts}"]
    output = f"--output={folder / 'scores.parquet'}"
    said = mmalign(*argv, output, "--reward=fault_cases.rewards:memory")
    tally.point(said.code == 0 and "no memory for 3 samples at once" in said.text, said.error)
    tally.answers = ["scored in halves with a warning; bitwise the same weights"]


from_tests(
    13,
    "programs and servers as rewards",
    NAMED,
    "tests/pipelines/test_online_faults.py",
    "tests/rewards/test_external.py",
)
