"""Train with Curriculum DPO (Croitoru et al. 2024, arXiv 2405.13637): easy pairs first.

Every other offline method takes the same `curriculum` options; Consistency DPO with a curriculum is
the paper's recipe for consistency models.
"""

from __future__ import annotations

from mmalign.config import CurriculumDpoConfig
from mmalign.pipelines import diffusion_dpo


def run(config: CurriculumDpoConfig, started: float | None = None) -> None:
    """Train, evaluate and write the run folder; `started` is when the whole job began."""
    diffusion_dpo.run(config, method="curriculum-dpo", started=started)
