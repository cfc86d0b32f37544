"""The main job in one command: pairs from rewards, preference training, proof, on Shapes world."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from mmalign.config import (
    EVALUATION_SEED,
    ConsistencyDpoConfig,
    CurriculumDpoConfig,
    DiffusionDpoConfig,
    PairsBuildConfig,
    QuickstartImageConfig,
)
from mmalign.options import parse_options
from mmalign.pipelines import consistency_dpo, curriculum_dpo, diffusion_dpo
from mmalign.pipelines.pairs_build import build_pairs

METHODS: dict[str, tuple[type[Any], Callable[..., None]]] = {
    "curriculum-dpo": (CurriculumDpoConfig, curriculum_dpo.run),
    "diffusion-dpo": (DiffusionDpoConfig, diffusion_dpo.run),
    "consistency-dpo": (ConsistencyDpoConfig, consistency_dpo.run),
}


def run(config: QuickstartImageConfig) -> None:
    """Build pairs with the base model and the CLIP reward, train, evaluate, and say what came out.

    Both jobs run from packaged configurations, `shapes_pairs` or `shapes_lcm_pairs` and
    `shapes_<method>`; nothing here is particular to Shapes world but their names.
    """
    started = time.monotonic()
    output = Path(config.output_dir or f"runs/quickstart-{config.method}-{config.seed}")
    pairs_name = "shapes_lcm_pairs" if config.method == "consistency-dpo" else "shapes_pairs"
    tqdm.write("1/2  sample candidates, score them, pair them")
    build_pairs(_settings(PairsBuildConfig, pairs_name, config.seed, f"--output={output}/pairs"))
    tqdm.write(f"2/2  train {config.method} and compare with the base on held-out prompts")
    config_class, train = METHODS[config.method]
    name = f"shapes_{config.method.replace('-', '_')}"
    flags = [f"--output_dir={output}", f"--pairs.path={output}/pairs", f"--seed={config.seed}"]
    flags += ["--resume_from_checkpoint=latest"]  # an interrupted quickstart continues
    train(_settings(config_class, name, config.seed, *flags), started=started)


def _settings(config_class: type[Any], name: str, seed: int, *flags: str) -> Any:
    """Read a packaged configuration; evaluation images get other seeds than the candidates."""
    sampling_seed = seed if config_class is PairsBuildConfig else seed + EVALUATION_SEED
    arguments = ["--config", name, f"--sampling.seed={sampling_seed}", *flags]
    return parse_options(config_class, arguments, command="quickstart image")
