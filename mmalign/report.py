"""What a run leaves behind for people and programs: `report.html`, `summary.json`, `README.md`."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from mmalign.plots import Panel, changes, panels
from mmalign.types import InputError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

PACKAGES = (
    "mmalign",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "open-clip-torch",
    "pillow",
)
COSTS = ("unet_forwards", "unet_backwards", "reward_queries")
MAX_PICTURES = 24
PICTURE_PIXELS = 320


class WinRateSummary(NamedTuple):
    """Win rate as `summary.json` has it; `value` and `ci95` may be NaN when nothing was decided."""

    value: float
    ci95: tuple[float, float]
    judge: str
    n: int
    wins: int
    losses: int
    ties: int
    value_with_ties: float


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The fields of `summary.json`.

    Attributes:
        method: preference method, or `evaluate`.
        model: model as the user named it.
        seed: base seed.
        steps: optimizer steps done.
        wall_seconds: duration of the whole run.
        peak_memory_mib: of the accelerator, or of the process on CPU.
        device: torch device.
        versions: package -> version.
        before: metric -> mean, for the base.
        after: metric -> mean, for the trained model.
        win_rate: of after against before; None when no judge was given.
        metrics: metric -> mean of the model under test, in runs that only evaluate; left out of
            `summary.json` when None.
        ci95: metric -> 95 % interval of `metrics`; left out when None.
        cost: what training spent: `unet_forwards` and `unet_backwards` in rows through the
            denoiser, `reward_queries` in images, `train_seconds`; left out when None.
    """

    method: str
    model: str
    seed: int
    steps: int
    wall_seconds: float
    peak_memory_mib: float
    device: str
    versions: Mapping[str, str]
    before: Mapping[str, float]
    after: Mapping[str, float]
    win_rate: WinRateSummary | None
    metrics: Mapping[str, float] | None = None
    ci95: Mapping[str, tuple[float, float]] | None = None
    cost: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image (3, H, W) in [0, 1] with the judge's verdict.

    `good` is True for right, False for wrong, None where the judge does not say.
    """

    image: Tensor
    verdict: str = ""
    good: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Base and trained model on one prompt and seed; `outcome` is after against before."""

    prompt: str
    seed: int
    before: Picture
    after: Picture
    outcome: str = ""


Marked = Sequence[tuple[str, bool]]
"""A text in pieces, each with whether it is marked as wrong."""


@dataclass(frozen=True, kw_only=True)
class AnswerComparison:
    """What base and trained model say to one question about images."""

    prompt: str
    images: Sequence[Image]
    before: Marked
    after: Marked


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything `report.html` shows.

    Attributes:
        summary: the numbers.
        changes: metric -> 95 % interval of after - before.
        comparisons: pictures side by side; long lists are thinned evenly.
        answers: answers side by side, all of them.
        metrics: lines of `metrics.jsonl`.
        curve: lines of `evaluations.jsonl`.
        rewards: names of the metrics in `curve` that are rewards.
        config: resolved configuration as YAML.
        warnings: what the run warned about.
    """

    summary: RunSummary
    changes: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    comparisons: Sequence[Comparison] = ()
    answers: Sequence[AnswerComparison] = ()
    metrics: Sequence[Mapping[str, float | None]] = ()
    curve: Sequence[Mapping[str, float | None]] = ()
    rewards: Sequence[str] = ()
    config: str = ""
    warnings: Sequence[str] = ()


def write_report(folder: Path, report: Report) -> Path:
    """Write `report.html`: one file that needs neither network nor scripts.

    Raises:
        InputError: if the folder cannot be written.
    """
    rows = [
        {
            "name": name,
            "before": report.summary.before.get(name),
            "after": report.summary.after.get(name),
            "change": report.changes.get(name),
        }
        for name in dict.fromkeys([*report.summary.before, *report.summary.after])
    ]
    text = render(
        "report.html.j2",
        report=report,
        summary=report.summary,
        rows=rows,
        shown=_thinned(report.comparisons),
        marked=any(bad for item in report.answers for _, bad in (*item.before, *item.after)),
        panels=panels(report.metrics),
        curves=_curves(report),
    )
    return _write(folder / "report.html", text)


def write_summary(folder: Path, summary: RunSummary) -> Path:
    """Write `summary.json`; numbers that are not finite become null.

    Raises:
        InputError: if the folder cannot be written.
    """
    content = asdict(summary)
    if summary.win_rate is not None:
        content["win_rate"] = summary.win_rate._asdict()
    for optional in ("metrics", "ci95", "cost"):
        if content[optional] is None:
            del content[optional]
    text = json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False)
    return _write(folder / "summary.json", text + "\n")


def write_model_card(
    folder: Path,
    summary: RunSummary,
    *,
    lora: bool = True,
    task: Literal["image", "vlm"] = "image",
) -> Path:
    """Write `README.md`, the model card of what was trained.

    Args:
        folder: the run's folder.
        summary: what was run and measured.
        lora: whether `folder / "adapter"` holds a LoRA, rather than `folder / "model"` a model.
        task: what kind of model it is.

    Raises:
        InputError: if the folder cannot be written.
    """
    packaged = summary.model.startswith("pkg://")
    template = "model_card.md.j2" if task == "image" else "vlm_card.md.j2"
    text = render(template, summary=summary, lora=lora, packaged=packaged)
    return _write(folder / "README.md", text)


def _markdown(text: object) -> str:
    """Keep text on one line and from making links, images, code or cells of a table."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\`\[\]|])", r"\\\1", line)


def render(template: str, **values: Any) -> str:
    """Fill a template of this package; text is escaped."""
    return _environment().get_template(template).render(**values)


def library_versions() -> dict[str, str]:
    """Look up installed versions without importing anything; missing packages are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def peak_memory_mib(device: str = "cpu") -> float:
    """Measure peak memory in MiB: allocated on a CUDA device, else resident in this process."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _curves(report: Report) -> list[Panel]:
    """Chart evaluations along training, what costs left out: first the rewards with the judge."""
    shown = [{k: v for k, v in row.items() if k not in COSTS} for row in report.curve]
    if len(shown) < 2:
        return []
    judge = report.summary.win_rate.judge if report.summary.win_rate is not None else None
    together = [name for name in (*report.rewards, judge) if name in shown[0]]
    first = [changes(shown, together)] if judge in together and len(together) > 1 else []
    return [*first, *panels(shown)]


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mmalign", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=_number, signed=_signed, percent=_percent, png=_png, picture=_picture
    )
    environment.filters["markdown"] = _markdown
    environment.tests["known"] = lambda value: value is not None and math.isfinite(value)
    return environment


def _thinned(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """First picture of each prompt, then evenly spaced prompts: nothing is picked by its looks."""
    first = {item.prompt: item for item in reversed(comparisons)}
    items = [first[prompt] for prompt in dict.fromkeys(item.prompt for item in comparisons)]
    if len(items) <= MAX_PICTURES:
        return items
    return [items[index * len(items) // MAX_PICTURES] for index in range(MAX_PICTURES)]


def _png(picture: Tensor) -> str:
    """Encode an image (3, H, W) in [0, 1] as a data URI, at most `PICTURE_PIXELS` wide or high."""
    from PIL import Image as Images

    pixels = (picture.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return _picture(Images.fromarray(pixels.cpu().numpy()))


def _picture(picture: Image) -> str:
    image = picture.copy()
    image.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "\u2013"
    return f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.2e}"


def _signed(value: float) -> str:
    return ("+" if value > 0 else "\u2212" if value < 0 else "\u00b1") + _number(abs(value))


def _percent(value: float) -> str:
    return f"{100 * value:.0f}\u00a0%"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, text: str) -> Path:
    """Replace the file in one step, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    return path
