"""The site: `make docs` runs its notebooks, `make docs-fast` does not."""

import os
import sys
from pathlib import Path

HOME = Path(__file__).parent.parent
sys.path.insert(0, str(HOME))

import t2i_jax  # noqa: E402

project = "t2i_jax"
author = "the t2i_jax authors"
copyright = "the t2i_jax authors, Apache-2.0"
version = release = t2i_jax.__version__
extensions = ["myst_nb", "sphinx_design", "sphinx_copybutton", "docs.ext.site"]
exclude_patterns = ["_build", "ext", "results/clip", "results/gan", "results/unclip", "results/zoo"]

# Markdown: equations, fenced directives, and an anchor for every heading, so that links to them are checked.
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4

# Notebooks are text (MyST), and what they print is kept until they change.
nb_execution_mode = "cache" if os.environ.get("T2I_DOCS_EXECUTE") == "1" else "off"
nb_execution_cache_path = str(HOME / "docs" / "_build" / "notebooks")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = "t2i_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": False,
    "show_navbar_depth": 1,
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
}
html_show_sourcelink = False
html_copy_source = False
