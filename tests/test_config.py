from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docstring_parser
import pytest
import yaml

from mmalign import config
from mmalign.config import as_path, changed_options, dump_config

CONFIGS = [
    value
    for value in vars(config).values()
    if inspect.isclass(value) and dataclasses.is_dataclass(value)
]


def documented(config_class: type) -> set[str]:
    """Collect the attributes that a class and its bases describe, as the help reads them."""
    names: set[str] = set()
    for base in filter(dataclasses.is_dataclass, config_class.__mro__):
        text = docstring_parser.parse(base.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE)
        names |= {option.arg_name for option in text.params if option.description}
    return names


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda c: c.__name__)
def test_every_option_is_described_and_has_a_default(config_class: type) -> None:
    instance = config_class()
    names = {field.name for field in dataclasses.fields(instance)}
    assert names <= documented(config_class)


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda c: c.__name__)
def test_nothing_is_described_that_does_not_exist(config_class: type) -> None:
    names = {field.name for field in dataclasses.fields(config_class)}
    assert documented(config_class) <= names


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda c: c.__name__)
def test_options_are_given_by_name_only(config_class: type) -> None:
    with pytest.raises(TypeError):
        config_class("value")


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda c: c.__name__)
def test_instances_share_no_mutable_default(config_class: type) -> None:
    first, second = config_class(), config_class()
    for field in dataclasses.fields(config_class):
        value = getattr(first, field.name)
        if isinstance(value, list | dict) or dataclasses.is_dataclass(value):
            assert value is not getattr(second, field.name)


def test_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="learning_rat"):
        config.TrainConfig(learning_rat=1.0)  # type: ignore[call-arg]


def test_dump_is_plain_yaml_of_every_option() -> None:
    value = config.DiffusionDpoConfig(
        curriculum=config.CurriculumConfig(num_buckets=3),
        evaluation=config.EvalConfig(rewards=[config.RewardConfig(name="é")]),
    )
    text = dump_config(value)
    assert yaml.safe_load(text) == dataclasses.asdict(value)
    assert "é" in text


def fields_of(config_class: Any) -> Iterator[tuple[str, Any]]:
    yield from typing.get_type_hints(config_class).items()


@pytest.mark.parametrize("path", sorted(as_path("pkg://mmalign.configs").glob("*.yaml")), ids=str)
def test_packaged_configs_state_only_existing_options(path: Path) -> None:
    """Some class of options has every key of the file; which one, the command line decides."""
    keys = set(yaml.safe_load(path.read_text("utf-8")))
    assert any(keys <= {name for name, _ in fields_of(c)} for c in CONFIGS)


def test_paths() -> None:
    assert as_path("~/x") == Path.home() / "x"
    assert as_path("relative/x") == Path("relative/x")
    assert as_path("pkg://mmalign.configs/x.yaml").parent.is_dir()
    assert as_path("pkg://mmalign.configs").samefile(Path(config.__file__).parents[1] / "configs")


def test_importing_config_is_light() -> None:
    code = "import sys, mmalign.config; sys.exit('torch' in sys.modules or 'yaml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_changed_options_are_named_with_both_values() -> None:
    before = config.DiffusionDpoConfig(beta=5000.0, report_to=["tensorboard"])
    after = dataclasses.replace(
        before, beta=500.0, lora=config.LoraConfig(rank=4), curriculum=config.CurriculumConfig()
    )
    assert changed_options(dump_config(before), dump_config(before)) == []
    assert changed_options("a: {b: 1, c: [1]}", "a: {b: 2, c: [1]}\nd: x") == [
        "a.b: 1 -> 2",
        "d: absent -> x",
    ]
    changes = changed_options(dump_config(before), dump_config(after))
    assert {"beta: 5000.0 -> 500.0", "lora.rank: 8 -> 4"} < set(changes)
