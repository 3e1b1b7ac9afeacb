"""The layers of the package: what may import what, what may never be imported, and that names are unique."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "t2i_jax"

# Lowest layer first; a package may import itself and those of layers before it, never of its own or of later ones.
LAYERS = [
    ("core",),
    ("noise", "zoo"),
    ("nn",),
    ("networks", "features"),
    ("interop", "sampling"),
    ("heads", "storage"),
    ("text", "codecs", "data"),
    ("models",),
    ("training", "presets"),
    ("release", "convert", "edits", "guides"),
    ("sampler",),
    ("pipeline",),
    ("evaluation", "previews", "encode", "plan"),
    ("bench",),
    ("comparison", "api"),
    ("fit",),
    ("cli",),
]
EXTRAS = ("torch", "tensorflow", "transformers", "diffusers", "libtpu")


def imports(file: Path) -> set[str]:
    """Dotted names of everything a file imports, at the top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return names


def package(name: str) -> str:
    return name.split(".")[1] if name.startswith("t2i_jax.") else ""


FILES = sorted(PACKAGE.rglob("*.py"))
LAYER = {name: i for i, layer in enumerate(LAYERS) for name in layer}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_down(file):
    mine = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if mine == "__init__":
        return
    assert mine in LAYER, f"{mine} is in no layer: add it to LAYERS and to ARCHITECTURE.md"
    for name in imports(file):
        other = package(name)
        if other and other in LAYER and other != mine:
            assert LAYER[other] < LAYER[mine], f"{file.name} ({mine}) imports {name}, a layer that is not below it"


@pytest.mark.parametrize("file", sorted((PACKAGE / "models").glob("*.py")), ids=lambda f: f.name)
def test_families_do_not_know_each_other(file):
    others = {f"t2i_jax.models.{f.stem}" for f in (PACKAGE / "models").glob("*.py") if f != file}
    assert not others & imports(file)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_private_or_stateful_interfaces(file):
    names = imports(file)
    assert not any(n.startswith("jax._src") for n in names)
    text = file.read_text()
    for word in ("nnx.jit", "nnx.grad", "nnx.scan", "nnx.Optimizer", "nnx.Rngs"):
        assert word not in text


def test_no_two_public_classes_share_a_name():
    """`config.json`, errors and readers name classes by their last name alone."""
    found = {}
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(str(file.relative_to(PACKAGE)))
    assert not {name: files for name, files in found.items() if len(files) > 1}


def test_importing_the_library_brings_no_extra():
    modules = [
        ".".join(("t2i_jax", *f.relative_to(PACKAGE).with_suffix("").parts)) for f in FILES if f.stem != "__init__"
    ]
    code = "import importlib, sys, jax\nknown = set(sys.modules)\n"  # jax imports libtpu where it is installed
    code += f"for m in {modules}: importlib.import_module(m)\n"
    code += (
        f"bad = [m for m in {EXTRAS} if m in set(sys.modules) - known]\nsys.exit(f'imported: {{bad}}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_tests_share_fixtures_alone():
    """No test module imports another, and none changes the path of imports: what they share is in tests/fixtures."""
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        modules = {part for name in imports(file) for part in name.split(".")[:-1]} | imports(file)
        assert not [m for m in modules if m.startswith(("test_", "tests.test_"))], file
        assert not re.search(r"sys\.path\.(insert|append)", file.read_text()), file
