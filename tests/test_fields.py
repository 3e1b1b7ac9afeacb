"""Numbers and words of configurations are checked where they are made, and named."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import pytest

from t2i_jax.core import config
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import Checked, Count, Finite, Grid, Positive, Range, Rate, Share, Size
from tests.fixtures import toys


@dataclasses.dataclass(frozen=True)
class Inner(Checked):
    width: Size = 8
    grid: Grid = (2, 2)
    kind: Literal["a", "b"] = "a"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Options(Checked):
    share: Annotated[float | jax.Array, Range(0, 1)] = 0.5
    steps: Annotated[int | jax.Array, Range(1, 10)] = 3


@dataclasses.dataclass(frozen=True)
class Outer(Checked):
    inner: Inner = Inner()
    other: Inner | None = None
    rate: Rate = 0.1
    shift: Finite = 0.0
    eps: Positive = 1e-6
    share: Share = 1.0
    count: Count = 0


nan, inf = float("nan"), float("inf")
WRONG = {
    "rate": [-0.1, 1, nan],
    "shift": [nan, inf, -inf],
    "eps": [0, -1, inf],
    "share": [1.1, nan],
    "count": [-1, 0.5],
}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, values in WRONG.items() for v in values])
def test_wrong_numbers_are_named(name, value):
    with pytest.raises(ConfigError, match=rf"Outer\.{name} {value}"):
        Outer(**{name: value})
    with pytest.raises(ConfigError, match=f"--{name}"):
        config.override(Outer(), [f"--{name}={value}"])


def test_sizes_grids_and_words():
    Outer(rate=0, count=0, share=0, eps=1, shift=-3)
    for bad in ({"width": 0}, {"width": 2.0}, {"grid": (2, 0)}, {"kind": "c"}, {"grid": (2, 1.5)}):
        with pytest.raises(ConfigError, match=f"Inner.{next(iter(bad))}"):
            Inner(**bad)
    with pytest.raises(ConfigError, match="one of a, b"):
        Inner(kind="c")
    with pytest.raises(ConfigError, match=r"^--inner.width 0: 1 to 2147483647$"):
        config.override(Outer(), ["--inner.width=0"])


@pytest.mark.parametrize("value", [3, "inner", (), {"width": 3}, Inner])
def test_a_config_is_no_plain_value(value):
    for field in ("inner", "other"):
        with pytest.raises(ConfigError, match=rf"Outer\.{field} .*: a Inner"):
            Outer(**{field: value})
    with pytest.raises(ConfigError, match="needs a value"):
        Outer(inner=None)  # pyright: ignore[reportArgumentType]
    assert Outer(other=None).other is None


@pytest.mark.parametrize("wrong", [{"model": 3}, {"data": 4}, {"train": {}}, {"mesh": 8}, {"text": "words.model"}])
def test_an_experiment_names_what_is_none_of_its_parts(wrong):
    right = toys.experiment()
    with pytest.raises(ConfigError, match=rf"Experiment\.{next(iter(wrong))}\b"):
        dataclasses.replace(right, **wrong)
    assert dataclasses.replace(right, codec=Path("runs/codec")).codec == "runs/codec"


def test_a_traced_number_has_no_value_yet():
    assert jax.jit(lambda x: 2 * Outer(rate=x).rate)(0.25) == 0.5
    assert jax.grad(lambda x: 2.0 * Outer(eps=x).eps)(0.25) == 2.0
    with pytest.raises(ConfigError, match=r"Outer\.rate .*a number"):
        jax.jit(lambda x: Outer(rate=x).rate)(jnp.ones(3))


def test_arrays_have_no_value_yet():
    with pytest.raises(ConfigError, match="0 to 1"):
        Options(share=2.0)
    with pytest.raises(ConfigError, match="1 to 10"):
        Options(steps=11)
    doubled = jax.jit(lambda o: jax.tree.map(lambda x: 2 * x, o))(Options(jnp.ones(3), jnp.int32(1)))
    assert doubled.share.shape == (3,)
