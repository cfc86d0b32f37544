"""What `mmalign evaluate image` compares: models, adapters and folders of images, by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.config import ModelConfig, SubjectConfig, as_path
from mmalign.data.folders import METADATA
from mmalign.data.images import SUFFIXES
from mmalign.types import InputError

if TYPE_CHECKING:
    from mmalign.config import EvaluateImageConfig, SamplingConfig

BASE = "base"
FORMS = "base, a LoRA, the folder of a run, a model, or a folder of images"
MAX_SLUG = 40


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One side of the comparison, with everything that makes its images.

    Attributes:
        name: for people.
        slug: for file names and keys; unique.
        model: the model; None for a folder of images.
        sampling: how the model is sampled.
        images: the folder of images; None for a model.
        prompts: file that says which image belongs to which prompt; the folder's own when None.
    """

    name: str
    slug: str
    model: ModelConfig | None
    sampling: SamplingConfig
    images: Path | None
    prompts: Path | None

    @property
    def source(self) -> str:
        """Say where the images come from."""
        if self.model is None:
            return str(self.images)
        return " + ".join(filter(None, [self.model.model, self.model.adapter]))


def list_subjects(config: EvaluateImageConfig) -> list[Subject]:
    """List what is compared, the baseline first.

    Raises:
        InputError: if there is nothing to compare, two subjects have one name, a subject is both a
            model and a folder, or something is not what it should be.
    """
    if config.subjects or config.compare:
        if config.adapter is not None or config.base_adapter is not None:
            raise InputError("adapter, base_adapter: with --compare or subjects, name them there")
        wanted = [*config.subjects, *(read_short(text) for text in config.compare)]
        if len(wanted) < 2:
            raise InputError("nothing to compare: give at least two subjects")
    else:
        wanted = _before_and_after(config)
    named = [replace(subject, name=subject.name or _name(subject)) for subject in wanted]
    names = [subject.name for subject in named]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two subjects are called {name!r}: give each a name of its own")
    slugs = _slugs(names)
    subjects = [_subject(config, *pair) for pair in zip(named, slugs, strict=True)]
    return _baseline_first(subjects, config.baseline)


def read_short(text: str) -> SubjectConfig:
    """Read `name=WHAT` or `WHAT` of the option `compare`; what it is shows in what is there.

    Raises:
        InputError: if it is nothing that can be compared.
    """
    name, separator, what = text.partition("=")
    if not separator:
        name, what = "", text
    elif not name.strip():
        raise InputError(f"compare: {text!r} has no name before '='")
    if what == BASE:
        return SubjectConfig(name=name or BASE)
    path = as_path(what)
    if path.is_dir():
        return _folder(name, what, path)
    if path.suffix == ".safetensors" and path.is_file():
        return SubjectConfig(name=name or path.stem, adapter=what)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", what) and not path.exists():
        return SubjectConfig(name=name, model=what)  # a hub id, which only the loader can tell
    raise InputError(f"compare: {what!r} is not {FORMS}")


def _folder(name: str, what: str, path: Path) -> SubjectConfig:
    """Tell by its files what a folder is; a run stands for what it trained."""
    inside = next((f for f in ("adapter", "model") if (path / f).is_dir()), None)
    if (path / "model_index.json").is_file():
        return SubjectConfig(name=name, model=what)
    if any(path.glob("*.safetensors")):
        return SubjectConfig(name=name, adapter=what)
    if (path / "summary.json").is_file() and inside is not None:
        trained = str(Path(what) / inside)
        name = name or path.resolve().name
        if inside == "adapter":
            return SubjectConfig(name=name, adapter=trained)
        return SubjectConfig(name=name, model=trained)
    pictures = any(file.suffix.lower() in SUFFIXES for file in path.iterdir())
    if (path / METADATA).is_file() or pictures:
        return SubjectConfig(name=name, images=what)
    raise InputError(f"compare: the folder {what} is not {FORMS}")


def _before_and_after(config: EvaluateImageConfig) -> list[SubjectConfig]:
    if config.adapter == config.base_adapter:
        raise InputError(
            "nothing to compare: give --adapter (and --base_adapter to compare two adapters),"
            " or --compare with several subjects"
        )
    return [
        SubjectConfig(name="before", adapter=config.base_adapter),
        SubjectConfig(name="after", adapter=config.adapter, adapter_scale=config.adapter_scale),
    ]


def _name(subject: SubjectConfig) -> str:
    """Call a subject what its last part is called; `adapter` and `model` name nothing."""
    what = subject.images or subject.adapter or subject.model
    if what is None:
        return BASE
    parts = [part for part in re.split(r"[/\\]", what.rstrip("/\\")) if part]
    telling = [part for part in parts if part not in ("adapter", "model", ".", "..")]
    return telling[-1].removesuffix(".safetensors") if telling else what


def _slugs(names: Sequence[str]) -> list[str]:
    slugs: list[str] = []
    for name in names:
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:MAX_SLUG] or "subject"
        slug, count = plain, 1
        while slug in slugs:
            count += 1
            slug = f"{plain}-{count}"
        slugs.append(slug)
    return slugs


def _subject(config: EvaluateImageConfig, subject: SubjectConfig, slug: str) -> Subject:
    folder = subject.images is not None
    if folder and (subject.model or subject.adapter):
        raise InputError(f"subject {subject.name}: is either a model or a folder of images")
    if subject.prompts is not None and not folder:
        raise InputError(f"subject {subject.name}: prompts says what its images are; give images")
    changes = {
        name: getattr(subject, name)
        for name in ("num_inference_steps", "guidance_scale")
        if getattr(subject, name) is not None
    }
    return Subject(
        name=subject.name,
        slug=slug,
        model=None if folder else _model(config, subject),
        sampling=replace(config.sampling, **changes),
        images=as_path(subject.images) if subject.images is not None else None,
        prompts=as_path(subject.prompts) if subject.prompts is not None else None,
    )


def _model(config: EvaluateImageConfig, subject: SubjectConfig) -> ModelConfig:
    """Take from the command what the subject leaves out, of its checkpoint all or nothing."""
    common = subject.model is None
    return ModelConfig(
        model=config.model if subject.model is None else subject.model,
        family=config.family if common else subject.family,
        revision=config.revision if common else subject.revision,
        variant=config.variant if common else subject.variant,
        adapter=subject.adapter,
        adapter_scale=subject.adapter_scale,
        device=config.device,
        dtype=config.dtype,
        offline=config.offline,
    )


def _baseline_first(subjects: list[Subject], baseline: str | None) -> list[Subject]:
    if baseline is None:
        return subjects
    names = [subject.name for subject in subjects]
    if baseline not in names:
        raise InputError(f"baseline: no subject is called {baseline!r}: {', '.join(names)}")
    first = subjects[names.index(baseline)]
    return [first, *(subject for subject in subjects if subject is not first)]
