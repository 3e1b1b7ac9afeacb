"""Measurements that are programs of their own, `python -m t2i_jax.evaluation.NAME`."""

import sys
from collections.abc import Callable, Sequence

from t2i_jax.core.errors import ConfigError
from t2i_jax.data.records import DataError


def as_program(main: Callable[[Sequence[str]], None]) -> None:
    """Call it with the arguments of this process; bad input ends in its message and status 2."""
    try:
        main(sys.argv[1:])
    except (ConfigError, DataError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
