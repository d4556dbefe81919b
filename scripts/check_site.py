"""Reads a built site: every link leads to a file and an anchor that exist, and no page asks another host for anything.

python scripts/check_site.py site
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = re.compile(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""")


@dataclass
class Html(HTMLParser):
    """The parts of a page that are checked: its anchors, its links, and what a browser loads to show it."""

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif given.get("rel") not in ("canonical", "next", "prev"):
            self.loads += [given[name] for name in ("href", "src", "data", "poster") if name in given]
            self.loads += [part.split()[0] for part in given.get("srcset", "").split(",") if part.strip()]
        self.loads += LOADS.findall(given.get("style", ""))


def read(path: Path) -> Html:
    page = Html()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def faults(site: Path) -> list[str]:
    """Returns what is wrong with the site, in a line each."""
    pages = {path: read(path) for path in sorted(site.rglob("*.html"))}
    found = [f"{site}: no page"] if not pages else []
    for path, page in pages.items():
        name = path.relative_to(site)
        outside = [load for load in page.loads if urlsplit(load).netloc]
        found += [f"{name}: loads {load}" for load in outside]
        for link in (*page.links, *page.loads):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            start = site if parts.path.startswith("/") else path.parent
            target = (start / unquote(parts.path).lstrip("/")).resolve() if parts.path else path.resolve()
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            if not target.is_file():
                found.append(f"{name}: {link}: no such file")
            elif anchor and target in pages and anchor not in pages[target].anchors:
                found.append(f"{name}: {link}: no such anchor")
    for sheet in sorted(site.rglob("*.css")):
        found += [f"{sheet.relative_to(site)}: loads {load}" for load in LOADS.findall(sheet.read_text("utf-8"))]
    return found


def main() -> int:
    site = Path(sys.argv[1]).resolve()
    found = faults(site)
    print(
        "\n".join(found)
        or f"{len(list(site.rglob('*.html')))} pages, every link and anchor exists, nothing is loaded from elsewhere"
    )
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
