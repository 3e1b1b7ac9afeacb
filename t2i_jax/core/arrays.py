"""Array annotations of public functions, and their checks: none for users, all of them in tests."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from jaxtyping import Bool, Float, Int, Integer, Key, Num, Shaped, UInt8

__all__ = ["CHECKED", "Bool", "Float", "Int", "Integer", "Key", "Num", "Shaped", "UInt8", "typed"]

P = ParamSpec("P")
R = TypeVar("R")

CHECKED = "T2I_CHECK_ARRAYS"
"""Environment variable: if it is set when a module is imported, its `typed` functions check their arrays."""

ARRAY = re.compile(r"\b(Bool|Float|Int|Integer|Key|Num|Shaped|UInt8)\[")


def typed(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which checks the shapes and dtypes of its annotations by jaxtyping where `CHECKED` is set.

    Only annotations of arrays are checked: configs and models are the type checker's.
    """
    if CHECKED not in os.environ:
        return function
    from beartype import beartype  # of the extra `test`
    from jaxtyping import jaxtyped

    annotations = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in annotations.items() if ARRAY.search(str(hint))}
    checked = jaxtyped(function, typechecker=beartype)
    function.__annotations__ = checked.__annotations__ = annotations
    return checked
