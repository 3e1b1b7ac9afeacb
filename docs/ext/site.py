"""What the site adds to Sphinx: the generated reference, equations without a script, links to files of the clone."""

from __future__ import annotations

from pathlib import Path

from sphinx.application import Sphinx

from docs.ext import mathml
from docs.ext.links import HOME, rewritten
from docs.ext.pages import pages

RESULTS = "\n\n```{toctree}\n:hidden:\n:glob:\n\n*\n```\n"


def write(app: Sphinx) -> None:
    """Write the generated pages; those that have not changed keep their times, so that they are not built again."""
    for path, text in pages().items():
        file = Path(app.srcdir, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists() or file.read_text() != text:
            file.write_text(text)


def read(app: Sphinx, name: str, content: list[str]) -> None:
    """The source of a page, with links as the site needs them."""
    page = Path(app.env.doc2path(name)).relative_to(HOME)
    content[0] = rewritten(content[0], page, page) + (RESULTS if name == "results/README" else "")


def setup(app: Sphinx) -> dict[str, bool]:
    mathml.setup(app)
    app.connect("builder-inited", write)
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
