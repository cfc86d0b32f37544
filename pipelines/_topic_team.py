"""Who does the jobs of topic overwriting: the model itself, another, a server, Shapes world."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mmalign.config import as_path
from mmalign.pipelines._evaluation import resolve_device
from mmalign.topics import prompts
from mmalign.topics.roles import (
    ModelJudge,
    ModelLabeller,
    ModelRewriter,
    ModelSplitter,
    ModelWriter,
)
from mmalign.topics.similarity import ClipSimilarity
from mmalign.topics.stages import drawing
from mmalign.topics.team import Job, Team
from mmalign.topics.types import AnsweringModel
from mmalign.types import InputError

if TYPE_CHECKING:
    from mmalign.config import (
        EndpointConfig,
        RoleConfig,
        TopicOverwriteConfig,
        VlmModelConfig,
    )

Worker = TypeVar("Worker")


class ModelPool:
    """Models by identity, so that jobs with the same one share it."""

    def __init__(self) -> None:
        """Begin empty."""
        self._models: dict[str, AnsweringModel] = {}

    def get(self, identity: str, load: Callable[[], AnsweringModel]) -> AnsweringModel:
        """Return a model, loaded now if need be."""
        if identity not in self._models:
            self._models[identity] = load()
        return self._models[identity]

    def keep(self, identity: str) -> None:
        """Let all models but one go, and give their memory back."""
        gone = [name for name in self._models if name != identity]
        for name in gone:
            del self._models[name]
        if gone:
            _empty_cache()


def make_team(config: TopicOverwriteConfig, *, answerer: AnsweringModel | None = None) -> Team:
    """Say who does what; nothing is loaded yet.

    Args:
        config: the options.
        answerer: a loaded model, instead of the one that `config` names.

    Raises:
        InputError: if a server is not described well enough to be asked.
    """
    pool = ModelPool()
    own = _own_identity(config, answerer)
    load_own = _own_loader(config, answerer)

    def job(
        role: RoleConfig,
        options: Any,
        make: Callable[[AnsweringModel], Worker],
        exact: Callable[[], Worker],
    ) -> Job[Worker]:
        if role.backend == "shapes":
            return Job("shapes", exact, exact=True)
        identity, load = own, load_own
        if role.backend == "model":
            identity, load = _identity(role.model), lambda: _load(role.model)
        elif role.backend == "endpoint":
            identity, load = _server(role.endpoint)
        name = json.dumps([identity, options, prompts.FINGERPRINT], sort_keys=True)
        return Job(name, lambda: make(pool.get(identity, load)))

    language, rewriting = config.language, config.rewriting
    size = config.yes_no_batch_size
    return Team(
        answerer=Job(own, lambda: pool.get(own, load_own)),
        splitter=job(
            config.splitter,
            [drawing(language), config.max_words, config.max_facts],
            lambda model: ModelSplitter(
                model=model,
                generation=language,
                max_words=config.max_words,
                max_facts=config.max_facts,
            ),
            _shapes("ShapesSplitter"),
        ),
        writer=job(
            config.writer,
            drawing(language),
            lambda model: ModelWriter(model=model, generation=language),
            _shapes("ShapesWriter"),
        ),
        judge=job(
            config.judge,
            None,
            lambda model: ModelJudge(model=model, batch_size=size),
            _shapes("ShapesTopicJudge"),
        ),
        labeller=job(
            config.labeller,
            None,
            lambda model: ModelLabeller(model=model, batch_size=size),
            _shapes("ShapesLabeller"),
        ),
        rewriter=job(
            config.rewriter,
            drawing(rewriting),
            lambda model: ModelRewriter(model=model, generation=rewriting),
            _shapes("ShapesRewriter"),
        ),
        similarity=_similarity(config),
        after_release=lambda: pool.keep(own),
    )


def _own_identity(config: TopicOverwriteConfig, answerer: AnsweringModel | None) -> str:
    if answerer is not None:
        return answerer.fingerprint
    return _server(config.endpoint)[0] if config.endpoint.url else _identity(config)


def _own_loader(
    config: TopicOverwriteConfig, answerer: AnsweringModel | None
) -> Callable[[], AnsweringModel]:
    if answerer is not None:
        return lambda: answerer
    return _server(config.endpoint)[1] if config.endpoint.url else lambda: _load(config)


def _server(config: EndpointConfig) -> tuple[str, Callable[[], AnsweringModel]]:
    from mmalign.chat import ChatEndpoint

    endpoint = ChatEndpoint(config)
    return endpoint.fingerprint, lambda: endpoint


def _load(config: VlmModelConfig) -> AnsweringModel:
    if not config.model:
        raise InputError("model is required: a vision-language checkpoint, or else endpoint.url")
    from mmalign.adapters import load_vlm

    return load_vlm(config, resolve_device(config.device))


def _similarity(config: TopicOverwriteConfig) -> Job[Any]:
    options = asdict(config.similarity)
    for name in ("threshold", "batch_size"):
        del options[name]
    paths = (config.similarity.clip_model, config.similarity.clip_pretrained)
    files = [_files(as_path(path)) if path else [] for path in paths]
    if any(files):
        options["files"] = files
    identity = json.dumps(options, sort_keys=True)
    return Job(identity, lambda: ClipSimilarity(config.similarity, resolve_device(config.device)))


def _shapes(name: str) -> Callable[[], Any]:
    def make() -> Any:
        from mmalign.shapes import topics

        return getattr(topics, name)()

    return make


def _identity(config: VlmModelConfig) -> str:
    """Name a model by its options and, if it is a folder, by its files as they are now."""
    options = {
        name: value
        for name in ("model", "family", "revision", "adapter", "dtype")
        if (value := getattr(config, name)) is not None
    }
    files = [
        _files(as_path(str(options[name]))) for name in ("model", "adapter") if options.get(name)
    ]
    return json.dumps([options, files], sort_keys=True)


def _files(folder: Path) -> list[list[Any]]:
    """List what tells a changed checkpoint: names, sizes and times of its files, or of one file."""
    paths = [folder, *sorted(folder.rglob("*"))] if folder.exists() else []
    stats = ((path, path.stat()) for path in paths if path.is_file())
    return [
        [path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns]
        for path, stat in stats
    ]


def _empty_cache() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
