"""Every command and snippet of README.md, CONTRIBUTING.md and docs/ is read by what it is for.

Python blocks are run, in one namespace per page; where a `text` block follows, it is what they
print. Commands are parsed by the real parser, YAML by the commands that it fits; the pages of
`RUN` are executed. Inline options must exist. A new page takes part by being there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import re
import shlex
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from mmalign import cli, config
from mmalign.cli import COMMANDS
from mmalign.launch import PASSED_ON, config_file, take_launch_options
from mmalign.options import _hint, _option_names, parse_options
from mmalign.types import InputError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = {"getting_started.md"}
TESTED_ELSEWHERE = {"external_rewards.md": "rewards/test_external.py"}  # its scripts are servers
INSTALLING = ("pip install", "uv sync", ".ci/run")
NOT_OURS = {"--config", "--help", "--version", "--group", "--strict", "--resolution"}
LAUNCHING = {f"--{name}" for name in ("accelerate_config", *PASSED_ON)}
FENCE = re.compile(r"^( *)```([\w-]*)[^\n]*\n(.*?)^\1```\s*?$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block and the line that it starts in."""

    language: str
    text: str
    line: int


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text("utf-8")
    found = [
        Block(match[2], textwrap.dedent(match[3]), text[: match.start()].count("\n") + 2)
        for match in FENCE.finditer(text)
    ]
    return [block for block in found if not languages or block.language in languages]


def commands(page: Path) -> list[str]:
    """List the lines of shell blocks, continued lines joined."""
    text = "\n".join(block.text for block in blocks(page, "bash", "sh", "shell", "console"))
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def mmalign_words(line: str) -> list[list[str]]:
    """Take what follows `mmalign` in every simple command of a line."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split, lexer.commenters = True, "#"
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("&|;"):
            found.append([])
        else:
            found[-1].append(word)
    return [words[words.index("mmalign") + 1 :] for words in found if "mmalign" in words]


def parse(words: list[str]) -> None:
    """Read a command as `mmalign` would, short of running it."""
    if words == ["--help"]:
        return
    name = cli._command_words(words)
    assert name in COMMANDS, words
    launch, words = take_launch_options(name, words)
    if launch is not None and not launch["accelerate_config"].endswith(".yaml"):
        assert config_file(launch["accelerate_config"]).is_file()
    command, flags = COMMANDS[name], words[len(name) :]
    if command.positional and flags and not flags[0].startswith("-"):
        flags = cli._named(command, flags)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        parse_options(getattr(config, command.config), flags, command=" ".join(name))


def cases() -> Iterator[Any]:
    for page in PAGES:
        for line in commands(page):
            for words in mmalign_words(line):
                yield pytest.param(page, words, id=f"{page.name}: {' '.join(words)[:60]}")


@pytest.mark.parametrize(("page", "words"), list(cases()))
def test_commands_are_valid(
    page: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"[\w.-]+\.yaml", " ".join(words)):  # a config that the page shows
        given = [b.text for b in blocks(page, "yaml") if set(yaml.safe_load(b.text))]
        Path(name).write_text(given[0] if given else "{}")
    parse(words)


def test_wrong_commands_would_be_found() -> None:
    for line in (
        "mmalign train dpoo",
        "mmalign generate --promt x",
        "mmalign env --config nothing",
    ):
        with pytest.raises(InputError):
            parse(mmalign_words(f"uv run {line}  # why")[0])


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python", "py")], ids=lambda p: p.name
)
def test_python_blocks_run_and_print_what_is_shown(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("documentation")  # dataclasses look their module up
    monkeypatch.setitem(sys.modules, "documentation", module)
    listing = blocks(page)
    for block, following in zip(listing, [*listing[1:], Block("", "", 0)], strict=True):
        if block.language not in ("python", "py"):
            continue
        # Tracebacks have the page's own line numbers.
        code = compile("\n" * (block.line - 1) + block.text, page.name, "exec")
        if block.language == "py" or page.name in TESTED_ELSEWHERE:
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, vars(module))
        if following.language == "text" and "print(" in block.text:
            assert printed.getvalue() == following.text


def test_scripts_of_other_pages_have_a_test_of_their_own() -> None:
    for page, test in TESTED_ELSEWHERE.items():
        assert page in (ROOT / "tests" / test).read_text("utf-8")


@pytest.mark.parametrize("name", sorted(RUN))
def test_commands_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = 0
    for line in commands(ROOT / "docs" / name):
        if any(line.startswith(start) for start in INSTALLING):
            continue
        ours = mmalign_words(line)
        if not ours:
            subprocess.run(["bash", "-c", line], check=True, timeout=20)
        for words in ours:
            with contextlib.suppress(SystemExit):  # --help
                assert cli.main(words) == 0, line
            ran += 1
    assert ran


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "yaml", "yml")], ids=lambda p: p.name
)
def test_yaml_is_a_config_of_some_command(page: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for block in blocks(page, "yaml", "yml"):
        file.write_text(block.text)
        problems = []
        for command in {command.config for command in COMMANDS.values()}:
            try:
                parse_options(getattr(config, command), ["--config", str(file)], command="x")
                break
            except InputError as error:
                problems.append(str(error))
        else:
            pytest.fail(f"{page.name}:{block.line}: {min(problems, key=len)}")


@functools.cache
def option_names() -> frozenset[str]:
    classes = {getattr(config, command.config) for command in COMMANDS.values()}
    return frozenset(name for one in classes for name in _option_names(one, ""))


def is_option(name: str) -> bool:
    if name.endswith(".*"):
        return any(option.startswith(name[:-1]) for option in option_names())
    if name in option_names():
        return True
    classes = [getattr(config, command.config) for command in COMMANDS.values()]
    return any(_hint(one, name) is not None for one in classes)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_inline_options_and_commands_exist(page: Path) -> None:
    prose = FENCE.sub("", page.read_text("utf-8"))
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose):
        words = " ".join(span.split()).removeprefix("uv run ")
        if words.startswith("--"):
            names = re.findall(r"(?<!\S)(--[\w.*+-]+)", words)
            others = [n for n in names if n not in NOT_OURS | LAUNCHING]
            unknown = [n for n in others if not is_option(n[2:].rstrip("+"))]
            assert not unknown, f"{page.name}: `{span}`"
        elif words.startswith("mmalign "):
            plain = words.split(" [")[0].removeprefix("mmalign ").split()
            if plain[0].isupper() or plain[0].startswith("--") or "|" in plain or "..." in plain:
                continue
            assert cli._command_words(plain) in COMMANDS or not plain[1:], f"{page.name}: `{span}`"
        elif words.startswith("python "):
            assert (ROOT / words.split()[1]).is_file(), f"{page.name}: `{span}`"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_linked_files_exist(page: Path) -> None:
    prose = FENCE.sub("", page.read_text("utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not link.startswith(("http", "#", "mailto:")):
            assert (page.parent / link.partition("#")[0]).exists(), f"{page.name}: {link}"


def test_configs_are_dataclasses_with_defaults() -> None:
    """The parser reads them from a YAML file alone, which the YAML test relies on."""
    for command in COMMANDS.values():
        one = getattr(config, command.config)
        missing = dataclasses.MISSING
        assert all(
            field.default is not missing or field.default_factory is not missing
            for field in dataclasses.fields(one)
        )
