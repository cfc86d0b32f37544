"""The methods of the DPO family on vision-language models, one literal each.

A new method is a new literal here. `beta` and weights are the authors' defaults. Where the paper
and the authors' code differ there is one preset for each; `deviations` says what differs from them.
Names in capitals are rows: chosen W and rejected L, with the image or text variant in front.
"""

from __future__ import annotations

import difflib

from mmalign.objectives.vlm_rows import (
    ImageSettings,
    Nll,
    PerturbSettings,
    Preset,
    Row,
    SpectralRatio,
    SpectralTriplet,
    Term,
    TokenKl,
    TokenRule,
)
from mmalign.types import InputError

W, L = Row(response="chosen"), Row(response="rejected")
SELF, REVISED = Row(response="self"), Row(response="revised")
NOISED_W, CROPPED_W = Row(image="noised"), Row(image="cropped")
MASKED_W, MASKED_REVISED = Row(image="masked"), Row(image="masked", response="revised")
ABSENT_W, ABSENT_L = Row(image="absent"), Row(image="absent", response="rejected")
# The chosen answer of another image, and that image with either chosen answer.
OTHER = Row(response="other")
OTHER_IMAGE_W, OTHER_IMAGE_OTHER = Row(image="other"), Row(image="other", response="other")
PERTURBED_W = Row(text="perturbed")
PERTURBED_L = Row(text="perturbed", response="rejected")
NOISED_PERTURBED_W = Row(image="noised", text="perturbed")

DPO = Preset(
    name="dpo",
    terms=(Term(name="dpo", coefficients={W: 1, L: -1}, loss="preference"),),
    beta=0.1,
    source="Rafailov et al. 2023, arXiv 2305.18290, equation 7",
)

RLAIF_V = Preset(
    name="rlaif_v",
    terms=(Term(name="dpo", coefficients={W: 1, L: -1}, loss="preference"),),
    regularizers=(Nll(name="sft", row=W, weight=0.0, average=False),),
    beta=0.1,
    source="Yu et al. 2024, arXiv 2405.17220; also the training of topic overwriting (TPO)",
    deviations="The code's SFT_weight, 0 by default, is the weight of `sft`.",
)

LLAVA_HOUND = Preset(
    name="llava_hound",
    terms=(Term(name="dpo", coefficients={W: 1, L: -1}, loss="preference"),),
    regularizers=(Nll(name="ce", row=W, weight=0.0),),
    beta=0.1,
    source="Zhang et al. 2024, arXiv 2404.01258: alpha DPO + gamma CE, alpha 1 and gamma 0",
    deviations="alpha and gamma are the weights of `dpo` and `ce`; CE is averaged per answer.",
)

MPO = Preset(
    name="mpo",
    terms=(
        Term(name="preference", coefficients={W: 1, L: -1}, weight=0.8, loss="preference"),
        Term(name="quality", coefficients={W: 1, L: -1}, weight=0.2, loss="bco_pair"),
    ),
    regularizers=(Nll(name="generation", row=W, weight=1.0),),
    beta=0.1,
    source="Wang et al. 2024, arXiv 2411.10442: mixed preference optimization of InternVL",
    deviations="The quality term has no running mean of rewards, as in TRL; CE is per answer.",
)

SIMPO = Preset(
    name="simpo",
    terms=(Term(name="simpo", coefficients={W: 1, L: -1}, loss="sigmoid", offset=0.5),),
    beta=2.0,
    tokens=TokenRule(average=True),
    reference_free=True,
    source="Meng et al. 2024, arXiv 2405.14734, equation 6; gamma is the offset",
)

LD_DPO = Preset(
    name="ld_dpo",
    terms=(Term(name="dpo", coefficients={W: 1, L: -1}, loss="preference"),),
    beta=0.1,
    tokens=TokenRule(weighting="desensitised", ld_alpha=0.5),
    source="Liu et al. 2024, arXiv 2409.06411",
    deviations="The paper tunes ld_alpha per model; 0.5 is the middle of its range.",
)

RLHF_V = Preset(
    name="rlhf_v",
    terms=(Term(name="ddpo", coefficients={W: 1, L: -1}, loss="preference"),),
    beta=0.5,
    tokens=TokenRule(weighting="segments", average=True, gamma=5.0),
    source="Yu et al. 2023, arXiv 2312.00849: dense DPO, divided by N = |unchanged| + 5 |changed|",
    deviations="Pure insertions and deletions count as changed, too.",
)

RLHF_V_OFFICIAL = Preset(
    name="rlhf_v_official",
    terms=(Term(name="ddpo", coefficients={W: 1, L: -1}, loss="preference"),),
    beta=0.5,
    tokens=TokenRule(weighting="segments", average=False, gamma=5.0, strict=True),
    source="The code of RLHF-V: weighted sums, not divided unless asked to",
)

MDPO = Preset(
    name="mdpo",
    terms=(
        Term(name="dpo", coefficients={W: 1, L: -1}, loss="preference"),
        Term(name="image", coefficients={W: 1, CROPPED_W: -1}),
        Term(name="anchor", coefficients={W: 1}),
    ),
    beta=0.1,
    source="Wang et al. 2024, arXiv 2406.11839; anchor margin 0",
)

MDPO_MASKED = Preset(
    name="mdpo_masked",
    terms=(
        Term(name="dpo", coefficients={W: 1, L: -1}, loss="preference"),
        Term(name="image", coefficients={W: 1, MASKED_W: -1}),
        Term(name="anchor", coefficients={W: 1}),
    ),
    beta=0.1,
    source="The code of mDPO, which hides visual tokens where the paper crops the image",
    deviations="Patches of pixels are hidden instead of the tower's output.",
)

CHIP = Preset(
    name="chip",
    terms=(
        Term(name="response", coefficients={W: 1, L: -1}, loss="preference"),
        Term(name="visual", coefficients={W: 1, NOISED_W: -1}),
        Term(
            name="segment",
            coefficients={W: 1, L: -1},
            weight=3.0,
            loss="preference",
            tokens=TokenRule(weighting="segments", average=True, gamma=4.0),
        ),
    ),
    regularizers=(TokenKl(name="token", down=L, hold=W, weight=0.1),),
    beta=0.5,
    source="Fu et al. 2025, arXiv 2501.16629; lambda 3 (LLaVA; 1 for Muffin), gamma 0.1",
    deviations=(
        "The token term has the sign of TDPO and of the authors' code, which lowers the KL of the"
        " rejected answer. Changed tokens weigh 4, as in the code."
    ),
)

CHIP_FUSED = Preset(
    name="chip_fused",
    terms=(
        Term(
            name="fused",
            coefficients={W: 2, L: -1, NOISED_W: -1},
            loss="preference",
            kl={L: -0.1, W: 0.1},
        ),
    ),
    beta=0.1,
    tokens=TokenRule(weighting="segments", average=False, gamma=4.0, strict=True),
    source="The code of CHiP: every part in one sigmoid; token weight 4 (LLaVA; 2 for Muffin)",
    deviations=(
        "With token weights the code multiplies the noised row's reference sum by the sum of all"
        " weights, a constant of thousands of nats; not reproduced."
    ),
)

POVID = Preset(
    name="povid",
    terms=(
        Term(name="dpo", coefficients={W: 1, L: -1}, weight=0.5, loss="preference"),
        Term(name="self", coefficients={W: 1, SELF: -1}, weight=0.5, loss="preference"),
    ),
    beta=0.1,
    source="Zhou et al. 2024, arXiv 2402.11411, stage 2 as in `tool/dpo_trainer_inherent.py`",
    deviations=(
        "Both networks score the policy's arg-max answer under the noised image; in the code the"
        " reference scores one of its own."
    ),
)

V_DPO = Preset(
    name="v_dpo",
    terms=(
        Term(
            name="guided",
            coefficients={W: 1.5, L: -1.5, ABSENT_W: -0.5, ABSENT_L: 0.5},
            frozen=frozenset({ABSENT_W, ABSENT_L}),
            loss="preference",
        ),
    ),
    beta=0.1,
    source="Xie et al. 2024, arXiv 2411.02712: DPO on g log p(y|v,x) - (g - 1) log p(y|0,x)",
    deviations=(
        "g is 1.5: the released script's 0 leaves no gradient. Guidance is on the log-probs of the"
        " answer's tokens, not renormalised over the vocabulary."
    ),
)

SYMPO = Preset(
    name="sympo",
    terms=(
        Term(name="dpo", coefficients={W: 1, L: -1}, loss="preference"),
        Term(name="pair", coefficients={W: 1, OTHER: -1}, weight=0.5),
        Term(name="pair_other", coefficients={OTHER_IMAGE_OTHER: 1, OTHER_IMAGE_W: -1}, weight=0.5),
        Term(
            name="margin",
            coefficients={W: 1, OTHER: -1, OTHER_IMAGE_OTHER: -1, OTHER_IMAGE_W: 1},
            weight=1e-4,
            loss="square",
        ),
        Term(name="anchor", coefficients={W: 1}),
        Term(name="anchor_other", coefficients={OTHER_IMAGE_OTHER: 1}),
    ),
    beta=0.1,
    source="Liu et al. 2025, arXiv 2506.11712 (SymMPO); lambda 0.5, gamma 1e-4, eta 1, delta 0",
    deviations="The squared margin difference is of implicit rewards, that is, includes beta.",
)

OPA = Preset(
    name="opa",
    terms=(
        Term(name="standard", coefficients={W: 1, L: -1}, loss="preference"),
        Term(name="revised", coefficients={REVISED: 1, L: -1}, loss="preference"),
        Term(name="image", coefficients={W: 1, MASKED_W: -1}, weight=0.2),
        Term(name="image_revised", coefficients={REVISED: 1, MASKED_REVISED: -1}, weight=0.2),
        Term(name="anchor", coefficients={W: 1}),
        Term(name="anchor_revised", coefficients={REVISED: 1}),
    ),
    beta=0.1,
    images=ImageSettings(mask_share=0.3, mask_patch=1),
    source="Yang et al. 2025, arXiv 2501.09695 (OPA-DPO)",
    deviations="Whole answers, and both chosen answers anchored upwards; see `opa_token_level`.",
)

OPA_TOKEN_LEVEL = Preset(
    name="opa_token_level",
    terms=(
        Term(name="standard", coefficients={W: 1, L: -1}, level="token"),
        Term(name="revised", coefficients={REVISED: 1, L: -1}, level="token"),
        Term(name="image", coefficients={W: 1, MASKED_W: -1}, weight=0.2, level="token"),
        Term(
            name="image_revised",
            coefficients={REVISED: 1, MASKED_REVISED: -1},
            weight=0.2,
            level="token",
        ),
        Term(name="anchor", coefficients={W: 1}, weight=2.0, level="token"),
        Term(name="anchor_revised", coefficients={REVISED: -1}, weight=2.0, level="token"),
    ),
    beta=0.1,
    images=ImageSettings(mask_share=0.3, mask_patch=1),
    source="The code of OPA-DPO: -log sigmoid at every token position, padding counted as 0",
    deviations=(
        "Kept as released, with both oddities: the t-th tokens of two answers are compared, and the"
        " anchor lowers the revised answer. Padding reaches to the longest answer of the batch."
        " Per-token scores of a judge, an option of the code, are left out."
    ),
)

TARS = Preset(
    name="tars",
    terms=(Term(name="dpo", coefficients={PERTURBED_W: 1, PERTURBED_L: -1}, loss="preference"),),
    regularizers=(
        SpectralRatio(
            name="spectral",
            chosen=PERTURBED_W,
            rejected=PERTURBED_L,
            ref_chosen=W,
            ref_rejected=L,
            weight=0.1,
            beta=1.0,
        ),
    ),
    beta=1.0,
    perturb=PerturbSettings(scope="prompt", rule="visual_gap", mode="mask", omega=0.1),
    source="Zhang et al. 2025, arXiv 2507.21584; alpha 1, beta 1, lambda 0.1",
    deviations=(
        "Equation 10 leaves the reduction over frequencies open; see `tars.log_energy`. Log-ratios"
        " compare both networks on the same perturbed prompt unless `ref_text` is `clean`."
    ),
)

TARS_OFFICIAL = Preset(
    name="tars_official",
    terms=(
        Term(name="dpo", coefficients={PERTURBED_W: 1, PERTURBED_L: -1}, loss="preference"),
        Term(name="visual", coefficients={PERTURBED_W: 1, NOISED_PERTURBED_W: -1}),
    ),
    regularizers=(
        SpectralTriplet(
            name="spectral", anchor=PERTURBED_W, positive=W, negative=L, weight=0.1, margin=0.5
        ),
    ),
    beta=0.1,
    images=ImageSettings(noise_timestep=500),
    perturb=PerturbSettings(scope="all", rule="share", mode="mask", share=0.05),
    source="The code of TARS, `llava/train/llava_trainer.py`: with a term on noised images",
    deviations=(
        "Three sequences per network go through the transformer instead of six, with the same"
        " numbers. Perturbed tokens are drawn per text and never image placeholders."
    ),
)

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        DPO,
        RLAIF_V,
        LLAVA_HOUND,
        MPO,
        SIMPO,
        LD_DPO,
        RLHF_V,
        RLHF_V_OFFICIAL,
        MDPO,
        MDPO_MASKED,
        CHIP,
        CHIP_FUSED,
        POVID,
        V_DPO,
        SYMPO,
        OPA,
        OPA_TOKEN_LEVEL,
        TARS,
        TARS_OFFICIAL,
    )
}

DEFAULT_MODES = {
    "rlhf_v": "paper",
    "mdpo": "cropped",
    "chip": "separate",
    "opa": "response_level",
    "tars": "paper",
}
"""What the preset of a method's own name is called among its modes."""


def find_preset(name: str, mode: str | None = None) -> Preset:
    """Look a preset up by name, and by mode where a method has several.

    `find_preset("tars", "official")` is `PRESETS["tars_official"]`.

    Raises:
        InputError: If there is no such preset or mode.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(PRESETS)}"
        raise InputError(f"unknown preset {name!r}; {hint}")
    if mode is None or mode == DEFAULT_MODES.get(name):
        return PRESETS[name]
    if f"{name}_{mode}" in PRESETS:
        return PRESETS[f"{name}_{mode}"]
    others = [key.removeprefix(f"{name}_") for key in PRESETS if key.startswith(f"{name}_")]
    modes = [DEFAULT_MODES[name], *others] if name in DEFAULT_MODES else []
    raise InputError(f"preset {name} has no mode {mode!r}; modes: {', '.join(modes) or 'none'}")
