"""Images and captions: sources, the pipeline that makes batches of them, and data sets built from packages.

Names are imported when they are used first: reading one image needs none of them.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from t2i_jax.data.pipeline import Data
    from t2i_jax.data.records import DataError, write_records
    from t2i_jax.data.sources import ArrayRecord, Folder, Mixture, Parquet, TarShards, Tfds

__all__ = [
    "ArrayRecord",
    "Data",
    "DataError",
    "Folder",
    "Mixture",
    "Parquet",
    "TarShards",
    "Tfds",
    "write_records",
]

_WHERE = {"Data": "pipeline", "DataError": "records", "write_records": "records"}


def __getattr__(name: str) -> object:  # of this module (PEP 562)
    if name not in __all__:
        raise AttributeError(f"module 't2i_jax.data' has no attribute '{name}'")
    value = globals()[name] = getattr(importlib.import_module(f"t2i_jax.data.{_WHERE.get(name, 'sources')}"), name)
    return value
