"""Other Pythons and newer libraries: an environment for each, and no deprecated call from this package."""

import functools
import logging
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent


def module(name, **names):
    """The globals of a module of this name."""
    return {"__name__": name, "warnings": warnings, "logging": logging, "functools": functools, **names}


def library(name, body):
    """A function `old` of a library, that says in its own way that it is deprecated."""
    there = module(name)
    exec(body, there)
    return there["old"]


def called(name, function):
    """Call a function from a module."""
    exec("def use(): return old()\nuse()", module(name, old=function))


PLAIN = "def old(): warnings.warn('it is old', CATEGORY, stacklevel=LEVEL)"
WRAPPED = """
def deprecated(f):
    @functools.wraps(f)
    def wrapper(*a):
        warnings.warn('it is old', CATEGORY, stacklevel=LEVEL)
        return f(*a)
    return wrapper
old = deprecated(lambda: None)
"""
WAYS = [
    *((name, body.replace("LEVEL", level), category) for name, body, level, category in (
        ("jax._src.deprecations", PLAIN, "2", DeprecationWarning),
        ("flax.jax_utils", PLAIN, "1", DeprecationWarning),
        ("flax.nnx.deprecations", WRAPPED, "1", DeprecationWarning),
        ("orbax.checkpoint", WRAPPED, "3", FutureWarning),
        ("grain.python", PLAIN, "1", PendingDeprecationWarning),
        ("numpy", PLAIN, "2", FutureWarning),
    )),
    ("orbax.checkpoint", "def old(): logging.getLogger('absl').warning('%s is deprecated', 'it')", DeprecationWarning),
    ("grain.python", "def old(): logging.error('Applying deprecated it')", DeprecationWarning),
]  # fmt: skip


@pytest.mark.parametrize("name, body, category", WAYS)
def test_a_deprecated_call_of_this_package_is_an_error(name, body, category):
    old = library(name, body.replace("CATEGORY", category.__name__))
    for caller in ("t2i_jax", "t2i_jax.storage.checkpoints"):
        with pytest.raises(category, match="it is (old|deprecated)|deprecated it"):
            called(caller, old)


@pytest.mark.parametrize("name, body, category", WAYS)
def test_what_a_library_does_to_itself_or_to_others_is_none(name, body, category):
    old = library(name, body.replace("CATEGORY", category.__name__))
    through = library("tensorboardX", "def old(): return inner()")
    through.__globals__["inner"] = old
    with warnings.catch_warnings(record=True):
        called("t2i_jax.training.records", through)
        called("t2i_jax_of_others", old)
        called("somebody", old)


def test_other_warnings_are_where_they_were():
    with pytest.warns(UserWarning, match="hm") as caught:
        warnings.warn("hm", stacklevel=1)
    assert caught[0].filename == __file__
    warned = library("flax", "def old(): warnings.warn('hm', UserWarning, stacklevel=2)")
    with pytest.warns(UserWarning, match="hm"):
        called("t2i_jax", warned)


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_every_python_has_an_environment_of_its_own():
    """`make` alone uses .venv, and never with packages of another Python that was asked for."""

    def shown(*arguments):
        done = subprocess.run(
            ["make", "-n", *arguments],
            cwd=HERE,
            env={"PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout + done.stderr

    number = f".venv-{sys.version_info.major}.{sys.version_info.minor}/bin/"
    for target in ("test", "check", "quickstart"):
        assert ".venv/bin/" in shown(target) and ".venv-" not in shown(target)
        other = shown(target, f"PYTHON={sys.executable}").replace(sys.executable, "python")
        assert number in other and ".venv/" not in other
    assert "--pythonpath .venv/bin/python" in shown("check")
    assert "PYTHON=nowhere: it does not run" in shown("test", "PYTHON=nowhere")
