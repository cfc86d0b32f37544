"""From the command line and YAML to a configuration dataclass, on jsonargparse.

Precedence: default < YAML (`--config`) < flag, wherever `--config` stands. Names are checked here
first, in YAML and flags alike, so that a wrong one is answered with the nearest valid one.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser

from mmalign.config import as_path
from mmalign.types import InputError

Config = TypeVar("Config")
PACKAGED = "pkg://mmalign.configs"


def parse_options(config_class: type[Config], argv: Sequence[str], *, command: str) -> Config:
    """Fill a configuration dataclass from flags and the YAML files they name.

    Args:
        config_class: one of `mmalign.config`.
        argv: flags, as `--name value`, `--name=value`, or `--name` alone for a boolean.
        command: what the user typed before them, for the help.

    Raises:
        InputError: an unknown name, a value of the wrong type, or an unusable YAML file.
        SystemExit: after printing the help for `--help`.
    """
    parser = make_parser(config_class, command=command)
    if "--help" in argv or "-h" in argv:
        parser.print_help()
        raise SystemExit(0)
    files, flags = _split(config_class, argv)
    from_files = []
    for file in files:
        _check_file(config_class, file)
        from_files.append(f"--config={file}")
        parser.where = f"{file}: "
        parser.parse_args(from_files)
    parser.where = ""
    values = parser.instantiate(parser.parse_args(from_files + flags))
    config = config_class(**{n: getattr(values, n) for n in typing.get_type_hints(config_class)})
    _expand_home(config)
    return config


def make_parser(config_class: type, *, command: str) -> _Parser:
    """Make the parser of a command, which also is the source of the documented options."""
    parser = _Parser(
        prog=f"mmalign {command}",
        usage="%(prog)s [--config FILE|NAME] [--option VALUE ...]",
        description=(config_class.__doc__ or "").partition("\n")[0],
        epilog=_epilog(config_class),
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file, or name of a packaged config")
    parser.add_class_arguments(config_class, as_group=False)
    return parser


def packaged_configs() -> list[str]:
    """List the names that `--config` accepts without a path."""
    return sorted(path.stem for path in as_path(PACKAGED).glob("*.yaml"))


class _Parser(ArgumentParser):
    """Reports errors as one `InputError` line, led by `where`."""

    where = ""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise InputError(self.where + _tidy(message)) from ex


def _tidy(message: str) -> str:
    """Put jsonargparse's wording for a wrong value on one plain line."""
    text = re.sub(r'Parser key "([^"]*)":', r"\1:", " ".join(message.split()))
    text = re.sub(r"Expected an? (typing\.)?Literal\[(.*?)\]", r"expected one of \2", text)
    text = re.sub(r"<class '(\w+)'>", r"\1", text)
    text = text.replace("Expected a ", "expected ").replace(". Got value:", ", got")
    # Of what it says about `X | None`, the line about X.
    return re.sub(
        r"Does not validate against .* Errors: - (.*?) - expected NoneType.*", r"\1", text
    )


def _split(config_class: type, argv: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Separate config files from flags, and bring every flag to the form `--name=value`."""
    files: list[Path] = []
    flags: list[str] = []
    lists: dict[str, list[str]] = {}
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") or token == "--":
            raise InputError(f"unexpected argument {token!r}; options are written --name value")
        name, has_value, value = token[2:].partition("=")
        values = [value] if has_value else _values(rest)
        if name == "config":
            files.append(_config_file(_single(name, values)))
            continue
        hint = _hint(config_class, name.removesuffix("+"))
        if hint is None:
            nearest = _nearest(config_class, name)
            raise InputError(f"unknown option --{name}; the nearest is --{nearest}, --help has all")
        if hint == list[str] and not name.endswith("+"):
            lists.setdefault(name, []).extend(v for value in values for v in _items(value))
        elif hint is bool and not values:
            flags.append(f"--{name}=true")
        else:
            flags.append(f"--{name}={_checked(name, _single(name, values), hint)}")
    return files, [f"--{name}={json.dumps(values)}" for name, values in lists.items()] + flags


def _values(rest: list[str]) -> list[str]:
    values = []
    while rest and not rest[0].startswith("--"):
        values.append(rest.pop(0))
    return values


def _single(name: str, values: list[str]) -> str:
    if not values:
        raise InputError(f"--{name}: its value is missing")
    if len(values) != 1:
        raise InputError(f"--{name}: expected one value, got {len(values)}: {' '.join(values)}")
    return values[0]


def _checked(name: str, value: str, hint: Any) -> str:
    """Refuse a plain word for a section of options, such as `--pairs pairs.jsonl`."""
    inner = _dataclass_in(hint)
    if inner is None or typing.get_origin(hint) is list or value in ("null", "None"):
        return value
    if value.startswith("{") or value.endswith((".yaml", ".yml")):
        return value
    first = next(iter(typing.get_type_hints(inner)))
    raise InputError(
        f"--{name}: is a section of options, not {value!r}: write --{name}.{first} and so on"
    )


def _items(value: str) -> list[str]:
    """Read `[a, b]` as a list; anything else is one item, commas and colons included."""
    if not value.startswith("["):
        return [value]
    try:
        loaded = yaml.safe_load(value)
    except yaml.YAMLError:
        return [value]
    return [str(item) for item in loaded] if isinstance(loaded, list) else [value]


def _config_file(text: str) -> Path:
    path = as_path(text)
    if path.is_file():
        return path
    bare = text.removesuffix(".yaml")
    packaged = as_path(f"{PACKAGED}/{bare}.yaml")
    if re.fullmatch(r"[\w-]+", bare) and packaged.is_file():
        return packaged
    nearest = difflib.get_close_matches(bare, packaged_configs(), n=1)
    hint = f"the nearest packaged one is {nearest[0]}" if nearest else "--help lists packaged ones"
    raise InputError(f"--config: no such file: {text}; {hint}")


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a mapping that names a key twice, where YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: key {key.value!r} is given twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _check_file(config_class: type, path: Path) -> None:
    try:
        content = yaml.load(path.read_text("utf-8-sig"), _UniqueKeys)
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    # PyYAML raises its own errors for wrong syntax, and nearly any for wrong numbers, dates, tags.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        kind = "nothing" if content is None else f"a {type(content).__name__}"
        raise InputError(f"{path}: expected a mapping of option names to values, found {kind}")
    unknown = [str(key) for key in content if key not in typing.get_type_hints(config_class)]
    if len(unknown) > 1 and len(unknown) * 2 > len(content):
        some = ", ".join(unknown[:3])
        raise InputError(f"{path}: is for another command: unknown keys {some}; --help has all")
    _check_keys(config_class, config_class, content, path, "")


def _check_keys(
    root: type, config_class: type, content: Mapping[Any, Any], path: Path, prefix: str
) -> None:
    hints = typing.get_type_hints(config_class)
    for key, value in content.items():
        name = f"{prefix}{key}"
        if key not in hints:
            raise InputError(f"{path}: unknown key {name}; the nearest is {_nearest(root, name)}")
        hint, inner = hints[key], _dataclass_in(hints[key])
        if value is None and type(None) not in typing.get_args(hint):
            raise InputError(f"{path}: {name}: expected a value, got nothing")
        if inner is None or value is None:
            continue
        if typing.get_origin(hint) is list:
            if not isinstance(value, list):
                raise InputError(f"{path}: {name}: expected a list, got {value!r}")
            items = [(f"{name}[{i}]", item) for i, item in enumerate(value)]
        else:
            items = [(name, value)]
        for where, item in items:
            if not isinstance(item, Mapping):
                raise InputError(f"{path}: {where}: expected a mapping of options, got {item!r}")
            _check_keys(root, inner, item, path, f"{where}.")


def _hint(config_class: type, dotted: str) -> Any:
    """Look up the type of a dotted option name; None when there is no such option."""
    head, _, tail = dotted.partition(".")
    hint = typing.get_type_hints(config_class).get(head)
    if hint is None or not tail:
        return hint
    inner = _dataclass_in(hint)
    if inner is not None:
        return _hint(inner, tail)
    return Any if typing.get_origin(hint) is dict else None


def _dataclass_in(hint: Any) -> type | None:
    """Find the dataclass in `X`, `X | None` or `list[X]`."""
    if dataclasses.is_dataclass(hint):
        return typing.cast(type, hint)
    return next((a for a in typing.get_args(hint) if dataclasses.is_dataclass(a)), None)  # type: ignore[return-value]


def _nearest(config_class: type, name: str) -> str:
    """Find the valid option most like `name`; the same word at another level is the likeliest."""
    options = list(_option_names(config_class, ""))
    plain = re.sub(r"\[\d+\]", "", name)
    leaf = plain.rpartition(".")[2]
    for option in options:
        if option.rpartition(".")[2] == leaf:
            return option
    return difflib.get_close_matches(plain, options, n=1, cutoff=0.0)[0]


def _option_names(config_class: type, prefix: str) -> Iterator[str]:
    for name, hint in typing.get_type_hints(config_class).items():
        yield prefix + name
        inner = _dataclass_in(hint)
        if inner is not None:
            yield from _option_names(inner, f"{prefix}{name}.")


def _expand_home(config: Any) -> None:
    """Expand a leading `~/`, which shells leave alone in YAML and in `--name=~/folder`."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, str) and value.startswith("~/"):
            setattr(config, field.name, str(Path(value).expanduser()))
        elif dataclasses.is_dataclass(value):
            _expand_home(value)


def _epilog(config_class: type) -> str:
    """Name the options inside optional sections and lists, which the help does not break down."""
    names = []
    for name in _option_names(config_class, ""):
        head, _, tail = name.rpartition(".")
        hint = _hint(config_class, head) if tail and head else None
        if hint is not None and not dataclasses.is_dataclass(hint):
            names.append(f"--{name}")
    packaged = ", ".join(packaged_configs())
    nested = f"Also: {', '.join(names)}. " if names else ""
    return f"{nested}Packaged configs: {packaged}."
