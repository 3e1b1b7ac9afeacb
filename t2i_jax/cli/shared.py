"""What all commands use."""

from t2i_jax.core.config import parse as parse
from t2i_jax.core.config import parse_some as parse_some
from t2i_jax.core.console import console as console
from t2i_jax.core.outputs import local as local
