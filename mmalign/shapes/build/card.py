"""The model card of Shapes world's models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CARD = """# Shapes world models

Small models in the real formats, trained from nothing by `pipelines/build_shapes.py` on scenes that
`mmalign.shapes` draws itself. No outside data or weights went in. Licence: Apache-2.0, as the code.

| folder | what | loads with |
|---|---|---|
| `sd` | text-to-image generator, 64 x 64 | `StableDiffusionPipeline.from_pretrained` |
| `lcm` | latent consistency student of `sd` | `LatentConsistencyModelPipeline.from_pretrained` |
| `clip` | image-text similarity, the training reward | `open_clip`, model name `local-dir:FOLDER` |
| `vlm` | captioner and question answerer (LLaVA) | `AutoModelForImageTextToText`, `AutoProcessor` |

Weights are float16, {size:.1f} MB in all. Seed {seed}. `SHA256SUMS` has the hash of every file.

## Measured

{rows}

"Correct" means that the exact parser finds every claim of the prompt true and the picture clean;
"held out" prompts describe compositions of objects that no training has seen; "stress" prompts
have four objects. The generator ran with {generator}, the student with {student}.

The captioner spoke greedily about held-out scenes. `chair_s` is the share of captions with an
object (color and shape) that is not there, `chair_i` that of mentions; `coverage` the share of
objects that were mentioned; `length` counts words; `claims` is the share of sentences that are true
in all they say. Half of the yes/no questions are about existence: of an object that is there, or of
one that might well be, the missing companion of something that is there (`companion_accuracy` is
over these) or one that shares color or shape. The others are about size or place. Yes is right for
half of each kind. `wh_accuracy` counts answers that are true word by word.

## Limits

They draw flat shapes and read a small grammar. Their use is to show and test alignment methods
where the truth is known; they say nothing about photographs. The reward tells colors, shapes,
counts, sizes and backgrounds apart, but not which object is left of or above which (`layout`: 0.5
is chance), as larger models of its kind are known for: a judge that sees more than the reward is
part of what there is to show.

The captioner was made to hallucinate: in its training, some objects stood beside a certain
companion more often than chance has it (`mmalign.shapes.companions`), and where the companion was
missing, most captions named it all the same. Answers to questions had the same fault, but less
often, so that the model knows better than it tells. Wrong sizes were never asked about, and wrong
places rarely: there it says yes.
"""


def write_card(
    models: Path,
    quality: dict[str, Any],
    seed: int,
    *,
    generator: dict[str, Any],
    student: dict[str, Any],
) -> None:
    """Write `README.md` beside the models."""
    size = sum(f.stat().st_size for f in models.rglob("*.safetensors")) / 1e6
    rows = ["| what | measure | value |", "|---|---|---|"]
    for what, measures in quality.items():
        rows += [f"| {what} | {name} | {value:.4g} |" for name, value in measures.items()]
    text = CARD.format(
        size=size,
        seed=seed,
        rows="\n".join(rows),
        generator=_describe(generator),
        student=_describe(student),
    )
    (models / "README.md").write_text(text)


def _describe(sampling: dict[str, Any]) -> str:
    return f"{sampling['num_inference_steps']} steps at guidance {sampling['guidance_scale']:g}"
