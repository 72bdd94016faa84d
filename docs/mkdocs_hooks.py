"""What the site has besides the Markdown: every public name and every sentence that refuses, read from the source."""

from __future__ import annotations

import ast
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
EXIT_CODES = {"UsageError": 2, "BadParameter": 2, "InputError": 3, "ConversionError": 3, "HostError": 4}

_SENTENCES = re.compile(r"<!-- sentences of exit code (\d) -->")
_MODULE = re.compile(r"^::: (tqexport[\w.]*)$", re.MULTILINE)
_API = "docs/api/"
_NAME_PAGE = """::: {module}.{name}
    options:
      heading_level: 1
"""
_MODULE_PART = """::: {module}
    options:
      members: false
      show_root_heading: {headed}
      show_root_toc_entry: {headed}

"""


def on_config(config: MkDocsConfig) -> None:
    """In the navigation, a page of the API is followed by those of its names."""
    (modules,) = [part["API"] for part in config.nav if "API" in part]
    for entry in modules:
        ((title, path),) = entry.items()
        pages = ({name: _API + _page_of(module, name)} for module in modules_of(path) for name in public_names(module))
        entry[title] = [path, *pages]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add a page for each public name."""
    for path in [path for path in files.src_uris if path.startswith(_API)]:
        for module in modules_of(path):
            for name in public_names(module):
                content = _NAME_PAGE.format(module=module, name=name)
                files.append(File.generated(config, _API + _page_of(module, name), content=content))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Put the sentences in the place of their comments, and a list of its public names behind each module."""
    if page.file.generated_by:  # the page of a name
        return markdown
    markdown = _SENTENCES.sub(lambda match: _listed(int(match[1])), markdown)
    return _MODULE.sub(lambda match: _with_names(match[1], headed=match[1] != page.title), markdown)


def modules_of(path: str) -> list[str]:
    """The modules that a page of the API describes."""
    return _MODULE.findall((ROOT / path).read_text(encoding="utf-8"))


def public_names(module: str) -> dict[str, str]:
    """What stands in ``__all__`` of a module, each with the first sentence of its docstring."""
    names = {}
    for name in _source()[module].exports:
        docstring = _source()[module][name].docstring
        if docstring is None:
            raise PluginError(f"{module}.{name} is public and has no docstring; write one")
        names[name] = re.split(r"(?<=\.)\s|\n\n", docstring.value)[0].replace("\n", " ")
    return names


@functools.cache
def _source() -> griffe.ModulesCollection:
    """All modules, with docstrings as the site has them."""
    extensions = griffe.load_extensions(str(ROOT / "docs" / "griffe_docstrings.py"))
    loader = griffe.GriffeLoader(search_paths=[ROOT], extensions=extensions)
    loader.load("tqexport")
    return loader.modules_collection


def _page_of(module: str, name: str) -> str:
    """Where the page of a name lies, from the folder of the API."""
    return f"{module.replace('.', '/')}/{name}.md"


def _with_names(module: str, headed: bool) -> str:
    """A module's docstring, with a heading or without, and a list of its public names."""
    lines = (
        f"* [`{name}`]({_page_of(module, name)}){{ #{name} }}: {sentence}"
        for name, sentence in public_names(module).items()
    )
    return _MODULE_PART.format(module=module, headed=headed) + "\n".join(lines)


def refusals() -> Iterator[tuple[int, Path, str]]:
    """Exit code, file and sentence of everything that is raised on purpose; ``…`` is what differs from case to case."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in _sources()}
    constants = {name: value for tree in trees.values() for name, value in _assigned(tree.body)}
    for path, tree in trees.items():
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                known = {**constants, **dict(_assigned(ast.walk(function)))}
                for node in ast.walk(function):
                    if isinstance(node, ast.Call) and node.args and (code := _exit_code(node)):
                        for sentence in _texts(node.args[0], known):
                            if sentence.strip("… "):
                                yield code, path.relative_to(ROOT), sentence


def _sources() -> list[Path]:
    return sorted({*(ROOT / "tqexport").rglob("*.py"), *(ROOT / "cli").rglob("*.py")} - {ROOT / "tqexport/errors.py"})


def _exit_code(call: ast.Call) -> int | None:
    """The exit code of the error that a call makes; None where it makes none."""
    function = call.func
    return EXIT_CODES.get(function.id if isinstance(function, ast.Name) else getattr(function, "attr", ""))


def _assigned(statements: Iterable[ast.AST]) -> Iterator[tuple[str, ast.expr]]:
    """Names and what is assigned to them."""
    for node in statements:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value


def _texts(node: ast.expr, known: Mapping[str, ast.expr]) -> list[str]:
    """What an expression that makes a string may say."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
        return _texts(node.value, known)
    if isinstance(node, ast.Name) and isinstance(known.get(node.id), ast.Constant | ast.JoinedStr | ast.IfExp):
        return _texts(known[node.id], {})
    if isinstance(node, ast.IfExp):
        return _texts(node.body, known) + _texts(node.orelse, known)
    if isinstance(node, ast.JoinedStr):
        return ["".join(parts) for parts in itertools.product(*(_texts(part, known) for part in node.values))]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return ["".join(parts) for parts in itertools.product(_texts(node.left, known), _texts(node.right, known))]
    return ["…"]


def _listed(code: int) -> str:
    """A list of the sentences of an exit code, a heading for each file with the first sentence of its docstring."""
    by_file: dict[Path, list[str]] = {}
    for exit_code, path, sentence in refusals():
        if exit_code == code and sentence not in by_file.setdefault(path, []):
            by_file[path].append(sentence)
    parts = []
    for path, sentences in by_file.items():
        docstring = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or str(path)
        about = docstring.partition("\n\n")[0].replace("\n", " ").replace("``", "`")
        parts.append(f"{about} (`{path}`)\n\n" + "\n".join(f"* `{sentence}`" for sentence in sentences))
    return "\n\n".join(parts)
