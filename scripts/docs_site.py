"""What MkDocs does not know of this repository: pages outside of docs/, links to them, and the API reference.

A link is written as it is right on disk (`../benchmarks/README.md`). Here it becomes a link to the page that the site
has for that file; a file that is no page of the site, such as a script, gets one that shows it.
"""

from __future__ import annotations

import ast
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src/hybridflow"
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")
LANGUAGES = {".sh": "bash", ".sbatch": "bash", ".py": "python", ".yaml": "yaml"}


@cache
def pages() -> dict[Path, str]:
    """Returns the page of the site that each Markdown file of the repository is."""
    found = {path: path.name for path in (ROOT / "docs").glob("*.md")}
    found |= {path: f"recipes/{path.parent.name}.md" for path in (ROOT / "recipes").glob("*/README.md")}
    others = {"README.md": "readme.md", "CHANGELOG.md": "changes.md", "CONTRIBUTING.md": "contributing.md"}
    return found | {ROOT / name: uri for name, uri in others.items()} | {ROOT / "benchmarks/README.md": "benchmarks.md"}


def target(page: Path, link: str) -> Path:
    """Returns the file that a link on a page names."""
    return Path(os.path.normpath(page.parent / link))


def shown(path: Path) -> str | None:
    """Returns the page of the site that shows a file which is none itself; None for pictures, which pages show."""
    own = path.is_relative_to(ROOT / "docs/site")
    return None if own or not path.is_file() else f"files/{path.relative_to(ROOT).as_posix()}.md"


def packages() -> list[str]:
    """Returns the folders of the package, and its files: what lies outside of all folders comes last."""
    folders = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
    return [*folders, *sorted(path.stem for path in PACKAGE.glob("[a-z]*.py"))]


def summary(name: str) -> str:
    """Returns the first sentence of a package's docstring, in one line."""
    folder = PACKAGE / name
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(said.split("\n\n")[0].split())


def package_page(name: str) -> str:
    """Makes the reference of a package: its modules in order of their names."""
    folder = PACKAGE / name
    if not folder.is_dir():
        return f"{LATER}# {name}\n\n::: hybridflow.{name}\n"
    modules = sorted(path for path in folder.rglob("[a-z]*.py"))
    names = [".".join(path.relative_to(ROOT / "src").with_suffix("").parts) for path in modules]
    return f"{LATER}# {name}\n\n{summary(name)}\n\n" + "\n".join(f"::: {module}\n" for module in names)


def public_page() -> str:
    """Makes the reference of the names that `import hybridflow` gives, as its stub has them, and a table of the
    packages.
    """
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    names = [name.name for node in stub.body if isinstance(node, ast.ImportFrom) for name in node.names]
    names.sort(key=lambda name: name[0].isupper())  # functions first
    rows = [f"| [{name}]({name}.md) | {summary(name)} |" for name in packages()]
    return "\n".join([PUBLIC, *(f"::: hybridflow.{name}\n" for name in names), PACKAGES, *rows, ""])


PUBLIC = """# API reference

`import hybridflow as hf` gives the names below, and [Python](../python.md) shows them at work. They are the public
interface; everything else may move.
"""
LATER = "---\nsearch:\n  boost: 0.2\n---\n\n"  # a search finds what is written for readers first
PACKAGES = """
## Packages

Each folder of `src/hybridflow` is a package. [Architecture](../architecture.md) says how they fit together.

| Package | What it holds |
| --- | --- |"""


class Doctests(griffe.Extension):
    """Shows the examples of a docstring as code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Puts a fence around every run of lines that begins with a prompt."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(r"\n\n```pycon\n\1\n```", obj.docstring.value)


EXAMPLE = re.compile(r"\n+(>>> .*(?:\n.*\S.*)*)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the pages of the API reference into the navigation."""
    assert config.nav is not None
    (section,) = (part for part in config.nav if "API" in part)
    section["API"] = ["api/index.md", *({name: f"api/{name}.md"} for name in packages())]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie outside of docs/, the files that pages link to, and the API reference."""
    made = {"api/index.md": public_page()} | {f"api/{name}.md": package_page(name) for name in packages()}
    for path, uri in pages().items():
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
        for link in LINK.findall(path.read_text(encoding="utf-8")):
            linked = target(path, link)
            uri_of_file = shown(linked)
            if uri_of_file is not None and linked not in pages():
                text = linked.read_text(encoding="utf-8")
                made[uri_of_file] = f"# {linked.name}\n\n````{LANGUAGES.get(linked.suffix, 'text')}\n{text}````\n"
    for uri, text in made.items():
        inclusion = InclusionLevel.NOT_IN_NAV if uri.startswith("files/") else InclusionLevel.UNDEFINED
        files.append(File.generated(config, uri, content=text, inclusion=inclusion))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links to files of the repository at their pages in the site."""
    here = next((path for path, uri in pages().items() if uri == page.file.src_uri), None)
    if here is None:
        return markdown

    def resolved(link: re.Match[str]) -> str:
        linked = target(here, link[0])
        uri = pages().get(linked) or shown(linked)
        if uri is None:
            return link[0]  # MkDocs says so where it does not exist
        return os.path.relpath(uri, Path(page.file.src_uri).parent)

    return LINK.sub(resolved, markdown)
