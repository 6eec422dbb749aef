"""What `make docs` adds to MkDocs: a hook, and an extension of Griffe, which reads docstrings.

* ``callbacks/`` lies at the top level, but is imported as ``rest_lightning.callbacks``. A copy of
  the sources has it there for Griffe, which reads files without importing them.
* Links from a page to a file outside ``docs/`` lead to the repository where ``repo_url`` is
  set, and plain text elsewhere.
* Roles in docstrings such as ``:class:`A2VDiT``` become code.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
SOURCE = ROOT / "build" / "docs" / "source"
CALLBACKS = "rest_lightning/callbacks"
# Pages that other work adds; delete a name when its page is there.
PENDING: frozenset[str] = frozenset()

_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>[^)\s:#]+)(?P<anchor>#[^)\s]*)?\)")
_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`(?P<short>~?)(?P<name>[^`]+)`")


def on_startup(command: str, dirty: bool) -> None:
    """Copies the sources. mkdocstrings drops search paths that are not there when it reads its
    options, so in a fresh checkout a later event would be too late.
    """
    shutil.rmtree(SOURCE, ignore_errors=True)
    for folder, name in (("rest_lightning", "rest_lightning"), ("callbacks", CALLBACKS)):
        for path in sorted((ROOT / folder).rglob("*.py")):
            target = SOURCE / name / path.relative_to(ROOT / folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def on_config(config: Any) -> Any:
    """Takes pages that are not there yet out of the navigation."""
    config.nav = [_without_missing(entry) for entry in config.nav]
    return config


def _without_missing(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    ((title, content),) = entry.items()
    if isinstance(content, list):
        content = [_without_missing(each) for each in content if not _is_missing(each)]
    return {title: content}


def _is_missing(entry: Any) -> bool:
    file = next(iter(entry.values())) if isinstance(entry, dict) else entry
    return isinstance(file, str) and file in PENDING and not (DOCS / file).exists()


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrites links that leave ``docs/`` or lead to a page that is not there yet."""
    folder = (DOCS / page.file.src_uri).parent

    def rewrite(match: re.Match[str]) -> str:
        target = (folder / match["target"]).resolve()
        if target.is_relative_to(DOCS):
            name = target.relative_to(DOCS).as_posix()
            return match["text"] if _is_missing(name) else match[0]
        if not config.repo_url or not target.is_relative_to(ROOT):
            return match["text"]
        path = target.relative_to(ROOT).as_posix()
        return f"[{match['text']}]({config.repo_url}/blob/main/{path}{match['anchor'] or ''})"

    return _LINK.sub(rewrite, markdown)


def plain(docstring: str) -> str:
    """Returns a docstring whose roles are code; ``~`` keeps the last name alone."""

    def code(match: re.Match[str]) -> str:
        name = match["name"].rpartition(".")[2] if match["short"] else match["name"]
        return f"`{name}`"

    return _ROLE.sub(code, docstring)


class PlainRoles(griffe.Extension):
    """Rewrites the docstrings of all objects that Griffe reads."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrites one."""
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)
