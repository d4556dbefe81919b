"""The check of the built documentation finds what a reader would stumble over."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOOD = '<a href="other.html#here">x</a><a href="https://example.org/elsewhere">x</a><img src="a%20picture.svg">'


def checked(site: Path) -> tuple[int, list[str]]:
    done = subprocess.run([sys.executable, ROOT / "scripts/check_site.py", site], capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines()


def test_the_check_names_every_broken_link_and_everything_loaded_from_another_host(tmp_path: Path) -> None:
    (tmp_path / "other.html").write_text('<h2 id="here">x</h2><a href="#here">x</a>')
    (tmp_path / "a picture.svg").write_text("<svg/>")
    page = tmp_path / "page.html"
    page.write_text(GOOD)
    assert checked(tmp_path)[0] == 0
    page.write_text(
        GOOD
        + '<a href="gone.html">x</a><a href="other.html#gone">x</a><script src="//cdn.example.org/x.js"></script>'
        + '<link rel="stylesheet" href="https://fonts.example.org/x.css"><img srcset="gone.png 2x">'
    )
    (tmp_path / "x.css").write_text("@import 'https://fonts.example.org/y.css'; a { background: url(x.png) }")
    status, said = checked(tmp_path)
    assert status == 1
    assert said == [
        "page.html: loads //cdn.example.org/x.js",
        "page.html: loads https://fonts.example.org/x.css",
        "page.html: gone.html: no such file",
        "page.html: other.html#gone: no such anchor",
        "page.html: gone.png: no such file",
        "x.css: loads https://fonts.example.org/y.css",
    ]
