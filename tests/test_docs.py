"""The documentation: what it names is there, what is there it names, and what it shows as code runs.

`docs/ext` makes the reference when the site is built (`make docs`); its pages are made here without Sphinx.
"""

import ast
import doctest
import importlib
import re
import subprocess
from pathlib import Path

import pytest

import t2i_jax as t2i
from docs.ext import commands, drawings, links, reach
from docs.ext.entries import entry, fields, name_of
from docs.ext.pages import formats, source_classes
from t2i_jax import convert
from t2i_jax.core import config
from t2i_jax.core.migration import Json

HOME = Path(__file__).parent.parent
LISTED = subprocess.run(
    ["git", "ls-files", "-co", "--exclude-standard", "*.md"], cwd=HOME, capture_output=True, text=True
)
PAGES = sorted({HOME / name for name in LISTED.stdout.split() if (HOME / name).exists()})
THINGS = {name: getattr(t2i, name) for name in t2i.__all__ if name not in ("__version__", "PRESETS")}


# -- the reference is whole


@pytest.mark.parametrize("name", sorted(THINGS))
def test_every_public_name_has_an_entry_with_what_it_is(name):
    thing = THINGS[name]
    assert thing in reach.documented()
    lines = entry(thing)
    assert ":no-typesetting:" in lines and any(f"}} t2i_jax.{name}" in line for line in lines)
    assert (thing.__doc__ or "").strip() and not thing.__doc__.startswith(f"{name}(")


def test_every_field_of_a_config_has_a_sentence():
    for cls in reach.configs():
        for field in fields(cls):
            assert re.match(r"[^(]", field.about), f"{name_of(cls)}.{field.name}: say what it is under the field"


def test_the_reference_has_every_class_that_configs_hold():
    documented = {f"{c.__module__}:{c.__qualname__}" for c in reach.configs()}

    def kinds(value: Json) -> set[str]:
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        own = {str(value["type"])} if isinstance(value, dict) and "type" in value else set()
        return own.union(*map(kinds, inside))

    files = sorted((HOME / "configs").glob("*.py"))
    held = set().union(*(kinds(config.to_json(config.load(file))) for file in files))
    assert len(held) > 40 and {kind for kind in held if kind.startswith("t2i_jax")} <= documented


def test_formats_commands_and_sources_are_all_there():
    page = formats()
    assert all(f"### `{name}`" in page for name in convert.formats())
    assert {c.__name__ for c in source_classes()} >= {
        "ArrayRecord",
        "Folder",
        "Mixture",
        "Parquet",
        "TarShards",
        "Tfds",
    }
    assert {"train", "data build", "bench solvers"} <= set(commands.names())
    shown = commands.help_of("release")
    assert shown.startswith("usage: t2i release") and "--out" in shown and "\x1b" not in shown


# -- what it says is there


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page, as GitHub and the site make them, and those that it names."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slug = lambda head: re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-")
    return set(map(slug, heads)) | set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))


GENERATED = ("docs/reference/", "docs/architecture.md", "docs/contributing.md", "docs/changelog.md", "docs/examples.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(HOME)))
def test_links_lead_to_files_and_headings(page):
    for target, anchor in re.findall(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([\w.-]+))?\)", page.read_text()):
        file = (page.parent / target).resolve() if target else page
        if not file.exists() and str(file.relative_to(HOME)).startswith(GENERATED):
            continue  # made when the site is built, which checks these links
        assert file.exists(), f"{page.relative_to(HOME)}: there is no {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.relative_to(HOME)}: {target or page.name} has no heading #{anchor}"


def test_links_that_leave_the_site_become_what_it_has():
    turned = lambda text: links.rewritten(text, Path("CONTRIBUTING.md"), Path("docs/contributing.md"))
    assert turned("[a](ARCHITECTURE.md)") == "[a](architecture.md)"
    assert turned("[a](docs/testing.md#markers-and-switches)") == "[a](testing.md#markers-and-switches)"
    assert turned("[a](examples/fsq.py)") == "[a](examples.md)"
    assert turned("see [configs](configs)") == "see configs"
    assert turned("[a](nowhere.md) [b](https://jax.dev) ![c](docs/x.png)") == (
        "[a](nowhere.md) [b](https://jax.dev) ![c](docs/x.png)"
    )


def strings() -> str:
    """All strings of the package, the parts of f-strings apart, one a line."""
    found = []
    for file in (HOME / "t2i_jax").rglob("*.py"):
        tree = ast.parse(file.read_text())
        found += [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return "\n".join(found)


def test_errors_of_the_page_are_errors_of_the_code():
    page = (HOME / "docs" / "reference" / "errors.md").read_text()
    messages = re.findall(r"^\| `(.+?)` +\|", page, re.MULTILINE)
    assert len(messages) > 40
    everything = strings()
    for message in messages:
        for part in filter(None, (p.strip() for p in message.split("..."))):
            assert part in everything, f"no error of the code says: {part}"


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_drawings_are_those_of_the_script(name):
    assert (drawings.FOLDER / f"{name}.svg").read_text() == drawings.DRAWINGS[name]().svg()


def test_the_drawing_of_layers_has_the_layers_that_are_held():
    tree = ast.parse((HOME / "tests" / "test_import_layers.py").read_text())
    layers = next(
        ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "LAYERS"
    )
    assert [packages for packages, _ in reversed(drawings.LAYERS)] == layers


def test_words_are_the_usual_ones():
    metaphors = re.compile(r"\b(told(?!\s+from|\s+apart)|beside|whoever|stands(?!\s+for\b|\s+in\b))\b", re.IGNORECASE)
    texts = [(page, page.read_text()) for page in PAGES]
    texts += [(file, file.read_text()) for file in (HOME / "t2i_jax").rglob("*.py")]
    found = [f"{f.relative_to(HOME)}: {m[0]}" for f, text in texts for m in metaphors.finditer(text)]
    assert not found


# -- what it shows runs


MODULES = sorted({module for module, _ in t2i._WHERE.values()})


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_run(name):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert not failed


def test_there_are_examples_in_docstrings():
    finder = doctest.DocTestFinder(recurse=False)
    shown = [n for n, t in THINGS.items() if any(test.examples for test in finder.find(t, n))]
    assert len(shown) >= 10
