"""Several models trained with equal compute on the same images, measured alike, in one report.

A config builds a `Comparison`; `run` trains what is not trained yet, draws and measures what is not measured yet, and
writes tables, plots and a sheet of images. Interrupted, it goes on where it stopped.
"""

from t2i_jax.comparison.plan import Comparison, Sweep, Variant
from t2i_jax.comparison.run import run

__all__ = ["Comparison", "Sweep", "Variant", "run"]
