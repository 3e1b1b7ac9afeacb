"""Links of Markdown files that leave the site: GitHub follows them in the clone, and the site has other pages there."""

from __future__ import annotations

import os
import re
from pathlib import Path

HOME = Path(__file__).parent.parent.parent
PAGES = {
    "ARCHITECTURE.md": "docs/architecture.md",
    "CONTRIBUTING.md": "docs/contributing.md",
    "CHANGELOG.md": "docs/changelog.md",
    "SECURITY.md": "docs/security.md",
    "README.md": "docs/index.md",
    "examples": "docs/examples.md",
}
"""Files and folders of the clone that are pages of the site."""
PAGES |= {str(f.relative_to(HOME)): "docs/examples.md" for f in (HOME / "examples").glob("*.py")}


def rewritten(text: str, source: Path, page: Path) -> str:
    """Markdown of the file `source` as the page `page` of the site, both below HOME.

    A link to a file that is a page becomes one to that page; a link to another file of the clone becomes its text.
    Others are left, for Sphinx to check.
    """

    def changed(found: re.Match[str]) -> str:
        words, target, anchor = found[1], found[2], found[3] or ""
        there = os.path.relpath(os.path.normpath(HOME / source.parent / target), HOME)
        if there in PAGES:
            return f"[{words}]({os.path.relpath(PAGES[there], page.parent)}{anchor})"
        file = HOME / there
        if there.startswith("..") or not file.exists():
            return found[0]
        in_site = there.startswith("docs/") and file.is_file()
        return f"[{words}]({os.path.relpath(there, page.parent)}{anchor})" if in_site else words

    return re.sub(r"(?<!!)\[([^\]]+)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)", changed, text)
