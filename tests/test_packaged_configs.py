"""Every packaged configuration parses for its command, and names what exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmalign import config as options
from mmalign.config import as_path
from mmalign.objectives.vlm_rows import plan
from mmalign.options import packaged_configs, parse_options
from mmalign.pipelines._compare_plan import plan_methods
from mmalign.pipelines._vlm_preset import resolve_preset

CLASSES = {
    "curriculum_dpo": options.CurriculumDpoConfig,
    "diffusion_dpo": options.DiffusionDpoConfig,
    "diffusion_dpo_full": options.DiffusionDpoConfig,
    "online_dpo": options.OnlineDpoConfig,
    "consistency_dpo": options.ConsistencyDpoConfig,
    "diffusion_kto": options.DiffusionKtoConfig,
    "mapo": options.MapoConfig,
    "dro": options.DroConfig,
    "d3po": options.D3poConfig,
    "tailorpo": options.TailorpoConfig,
    "draft": options.DraftConfig,
    "rocm": options.RocmConfig,
    "compare": options.CompareConfig,
    "vlm_compare": options.CompareConfig,
    "pairs": options.PairsBuildConfig,
    "lcm_pairs": options.PairsBuildConfig,
    "vlm_dpo": options.VlmDpoConfig,
    "tars": options.VlmDpoConfig,
    "topics": options.TopicOverwriteConfig,
}
VLM_FAMILIES = ("llava15", "qwen25vl")


@pytest.mark.parametrize("name", packaged_configs())
def test_configuration_parses(name: str) -> None:
    family, _, rest = name.partition("_")
    assert family in ("shapes", "sd15", "sdxl", "lcm", *VLM_FAMILIES)
    config = parse_options(CLASSES[rest], ["--config", name], command="x")
    # Real checkpoints are hub ids; Shapes world's are folders inside the package.
    if not rest.endswith("compare"):  # which names configurations of methods, each with its model
        assert config.model.startswith("pkg://") == (family == "shapes")


@pytest.mark.parametrize("name", packaged_configs())
def test_configuration_says_where_its_values_come_from(name: str) -> None:
    text = (as_path("pkg://mmalign.configs") / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")


def test_evaluation_uses_a_judge_that_does_not_train() -> None:
    for method in ("curriculum_dpo", "diffusion_dpo", "consistency_dpo"):
        config = parse_options(CLASSES[method], ["--config", f"shapes_{method}"], command="x")
        pairs = "shapes_lcm_pairs" if method == "consistency_dpo" else "shapes_pairs"
        build = parse_options(options.PairsBuildConfig, ["--config", pairs], command="x")
        assert config.evaluation.judge is not None
        assert config.evaluation.judge.name not in {reward.name for reward in build.rewards}
        assert Path(config.evaluation.prompts or "").name == "held_out.txt"
        assert Path(build.prompts).name == "train.txt"


def test_online_training_never_sees_the_judge_or_the_held_out_prompts() -> None:
    for method in ("d3po", "tailorpo", "draft", "rocm"):
        config = parse_options(CLASSES[method], ["--config", f"shapes_{method}"], command="x")
        assert config.evaluation.judge is not None
        assert config.evaluation.judge.name not in {reward.name for reward in config.rewards}
        assert Path(config.evaluation.prompts or "").name == "held_out.txt"
        assert Path(config.prompts).name == "train.txt"


VLM_TRAINING = [n for n in packaged_configs() if n.endswith(("_vlm_dpo", "_tars"))]


@pytest.mark.parametrize("name", VLM_TRAINING)
def test_presets_of_configurations_exist(name: str) -> None:
    config = parse_options(options.VlmDpoConfig, ["--config", name], command="x")
    preset = resolve_preset(config)
    assert (config.clip_model is not None) == any(
        r.text == "perturbed" for r in plan(preset).policy
    )


@pytest.mark.parametrize(
    "name",
    [n for n in packaged_configs() if not n.startswith("shapes_") and n not in VLM_TRAINING],
)
def test_real_checkpoints_are_not_scored_by_the_reward_of_shapes_world(name: str) -> None:
    family, _, rest = name.partition("_")
    config = parse_options(CLASSES[rest], ["--config", name], command="x")
    if rest == "topics":
        assert config.similarity.clip_model == "ViT-L-14-336"
        return
    for reward in [*getattr(config, "rewards", []), *config.evaluation.rewards]:
        assert reward.name != "clip" or reward.options["model"] == "ViT-L-14", family


@pytest.mark.parametrize("name", [n for n in packaged_configs() if n.endswith("compare")])
def test_a_comparison_names_methods_that_parse(name: str) -> None:
    methods = plan_methods(parse_options(options.CompareConfig, ["--config", name], command="x"))
    assert len(methods) > 3
    for clip in {getattr(method.parsed, "clip_model", None) for method in methods} - {None}:
        assert as_path(clip).is_dir()
