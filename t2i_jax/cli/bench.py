"""`t2i bench`: speeds against the limits of this machine."""

from t2i_jax.bench import KINDS
from t2i_jax.bench import main as run

__all__ = ["KINDS", "run"]
