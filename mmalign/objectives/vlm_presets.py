"""The methods of the DPO family on vision-language models, one literal each.

A new method is a new literal here. `beta` is the authors' default; what differs from the paper or
from the authors' code stands in `deviations`.
"""

from __future__ import annotations

from mmalign.objectives.vlm_rows import Preset, Row, Term

CHOSEN = Row(response="chosen")
REJECTED = Row(response="rejected")

DPO = Preset(
    name="dpo",
    terms=(Term(name="dpo", coefficients={CHOSEN: 1, REJECTED: -1}, loss="preference"),),
    beta=0.1,
    source="Rafailov et al. 2023, arXiv 2305.18290, equation 7",
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in (DPO,)}
