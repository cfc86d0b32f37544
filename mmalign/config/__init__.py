"""Every option of every command, as keyword-only dataclasses with no heavy imports.

Option names follow Hugging Face's trainers where one exists. `mmalign.cli` fills these from
defaults, then a YAML file, then flags; an unknown key is an error that names the nearest valid one.
"""

from mmalign.config.compare import (
    TRAIN_CONFIGS,
    BudgetConfig,
    BudgetUnit,
    CompareConfig,
    MethodConfig,
)
from mmalign.config.files import (
    as_path,
    dump_config,
)
from mmalign.config.jobs import (
    EnvConfig,
    EvaluateImageConfig,
    ExportConfig,
    GenerateConfig,
    PairsBuildConfig,
    PairsCheckConfig,
    QuickstartImageConfig,
    ScoreConfig,
)
from mmalign.config.offline import (
    ConsistencyDpoConfig,
    CurriculumDpoConfig,
    DiffusionDpoConfig,
    DiffusionKtoConfig,
    DroConfig,
    MapoConfig,
    OfflineConfig,
)
from mmalign.config.online import (
    D3poConfig,
    DraftConfig,
    OnlineConfig,
    RocmConfig,
    TailorpoConfig,
    TrajectoryConfig,
)
from mmalign.config.parts import (
    ATTENTION_TARGETS,
    CurriculumConfig,
    EvalConfig,
    Family,
    LoraConfig,
    LossType,
    ModelConfig,
    OnBadRow,
    PairRule,
    PairsConfig,
    PreferenceConfig,
    ReferenceConfig,
    RewardConfig,
    RunConfig,
    SamplingConfig,
    TrainConfig,
)

__all__ = [
    "ATTENTION_TARGETS",
    "TRAIN_CONFIGS",
    "BudgetConfig",
    "BudgetUnit",
    "CompareConfig",
    "ConsistencyDpoConfig",
    "CurriculumConfig",
    "CurriculumDpoConfig",
    "D3poConfig",
    "DiffusionDpoConfig",
    "DiffusionKtoConfig",
    "DraftConfig",
    "DroConfig",
    "EnvConfig",
    "EvalConfig",
    "EvaluateImageConfig",
    "ExportConfig",
    "Family",
    "GenerateConfig",
    "LoraConfig",
    "LossType",
    "MapoConfig",
    "MethodConfig",
    "ModelConfig",
    "OfflineConfig",
    "OnBadRow",
    "OnlineConfig",
    "PairRule",
    "PairsBuildConfig",
    "PairsCheckConfig",
    "PairsConfig",
    "PreferenceConfig",
    "QuickstartImageConfig",
    "ReferenceConfig",
    "RewardConfig",
    "RocmConfig",
    "RunConfig",
    "SamplingConfig",
    "ScoreConfig",
    "TailorpoConfig",
    "TrainConfig",
    "TrajectoryConfig",
    "as_path",
    "dump_config",
]
