"""Options of samplers, which are traced: new values compile nothing anew."""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Any, Self, get_args, get_origin, get_type_hints

import jax.numpy as jnp

from t2i_jax.core.fields import Checked, values


@dataclasses.dataclass(frozen=True)
class Options(Checked):
    """The base of sampling options; every field is a number, or an array with one for each image, or static."""

    def arrays(self) -> Self:
        """The same as arrays of one dtype per field, that of its annotation, so that `2` and `2.0` are one compilation;
        a field marked `static` stays as it is."""
        given = values(self)
        return dataclasses.replace(
            self, **{k: jnp.asarray(given[k], dtype) for k, dtype in _dtypes(type(self)).items()}
        )


@functools.cache
def _dtypes(cls: type) -> dict[str, Any]:
    """Dtypes of the traced fields, by name."""
    hints = get_type_hints(cls, include_extras=True)
    traced = [f.name for f in dataclasses.fields(cls) if not f.metadata.get("static")]
    return {name: _dtype_of(hints[name]) for name in traced}


def _dtype_of(hint: Any) -> Any:
    kinds = get_args(get_args(hint)[0] if get_origin(hint) is Annotated else hint)
    return jnp.bool_ if bool in kinds else jnp.float32 if float in kinds else jnp.int32
