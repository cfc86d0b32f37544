"""What MkDocs is told besides the pages in this folder.

The start page is the README, the options of every command come from its parser, and every public
module has an API page. Links that point into the repository lead to these pages.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from mmalign import config as options
from mmalign.cli import COMMANDS, Command
from mmalign.options import make_parser, packaged_configs

ROOT = Path(__file__).resolve().parents[1]
FIRST = ("index.md", "getting_started.md")
COPIED = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "embedded_models.md": "mmalign/shapes/models/README.md",
}
"""Pages that are files of the repository, by their place in the site."""
LAYERS = ("objectives", "rewards", "adapters", "data", "topics", "hallucination", "pipelines")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)\s]+)\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the pages: two to start with, every guide, the reference, the project."""
    guides = sorted(p.name for p in Path(__file__).parent.glob("*.md") if p.name not in FIRST)
    config.nav = [
        *FIRST,
        {"Guides": [*guides, "embedded_models.md"]},
        {"Command line": "cli.md"},
        {"API": list(_api_sections())},
        {"Project": ["contributing.md", "changelog.md"]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files of this folder."""
    pages = {page: (ROOT / source).read_text("utf-8") for page, source in COPIED.items()}
    pages["cli.md"] = "\n".join(_command_line())
    pages |= {f"api/{name}.md": f"::: {name}\n" for name in modules()}
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links into the repository to the page about their target, or leave their text."""
    here = page.file.src_uri
    source = COPIED.get(here, f"docs/{here}")

    def replaced(match: re.Match[str]) -> str:
        text, (path, _, anchor) = match.group(1), match.group(2).partition("#")
        if not path:
            return match.group(0)
        target = _page(posixpath.normpath(posixpath.join(posixpath.dirname(source), path)))
        if target is None:
            return text
        relative = posixpath.relpath(target, posixpath.dirname(here) or ".")
        return f"[{text}]({relative}{'#' + anchor if anchor else ''})"

    return LINK.sub(replaced, markdown)


def modules() -> list[str]:
    """Name every public module of the package."""
    found = set()
    for path in (*ROOT.glob("mmalign/**/*.py"), *ROOT.glob("mmalign/[rp]*s/*.py")):
        name = _module(path.relative_to(ROOT).as_posix())
        if not any(part.startswith("_") for part in name.split(".")):
            found.add(name)
    return sorted(found - {"mmalign.configs"})


def _api_sections() -> Iterator[dict[str, list[dict[str, str]]]]:
    names = modules()
    for layer in LAYERS:
        inside = [name for name in names if name.split(".")[1:2] == [layer]]
        yield {layer: [{name.removeprefix("mmalign."): f"api/{name}.md"} for name in inside]}
        names = [name for name in names if name not in inside]
    yield {"core": [{name.removeprefix("mmalign."): f"api/{name}.md"} for name in names]}


def _module(path: str) -> str:
    """`mmalign/lora.py` or `rewards/clip.py` as the name that is imported."""
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name if name.split(".")[0] == "mmalign" else f"mmalign.{name}"


def _page(path: str) -> str | None:
    """Find the page about a file or folder of the repository."""
    for page, source in COPIED.items():
        if source == path:
            return page
    if path.startswith("docs/") and path.endswith(".md"):
        return path.removeprefix("docs/")
    name = _module(path.rstrip("/"))
    return f"api/{name}.md" if name in modules() else None


def _command_line() -> Iterator[str]:
    yield "# Command line\n"
    yield "Options come from defaults, then `--config`, then flags; a YAML file nests what a flag"
    yield "writes with dots. A list takes several values, `--name+ VALUE` appends one. What several"
    yield "commands have, such as `lora.*`, means the same everywhere. Packaged configs:"
    yield ", ".join(f"`{name}`" for name in packaged_configs()) + "."
    for words, command in COMMANDS.items():
        yield from _command(" ".join(words), command)


def _command(name: str, command: Command) -> Iterator[str]:
    parser = make_parser(getattr(options, command.config), command=name)
    argument = f" {command.positional.upper()}" if command.positional else ""
    yield f"\n## mmalign {name}\n"
    yield f"`mmalign {name}{argument} [--config FILE|NAME] [--option VALUE ...]`\n"
    yield f"{command.summary[0].upper()}{command.summary[1:]}.\n"
    if command.positional:
        yield f"`{argument.strip()}` is `--{command.positional}`.\n"
    yield "| option | default | meaning |"
    yield "|---|---|---|"
    for action in parser._actions:
        if hasattr(action, "_typehint"):
            yield f"| `--{action.dest}` | {_default(action.default)} | {_meaning(action)} |"


def _default(value: Any) -> str:
    if value is None or value == "":
        return ""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`".replace("|", "\\|")


def _meaning(action: Any) -> str:
    text = " ".join((action.help or "").split()).replace("|", "\\|")
    choices = getattr(action._typehint, "__args__", ())
    literal = "Literal" in str(action._typehint) and all(isinstance(c, str) for c in choices)
    if not literal or all(f"`{choice}`" in text for choice in choices):
        return text
    return f"{text} One of {', '.join(f'`{choice}`' for choice in choices)}."
