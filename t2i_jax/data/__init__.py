"""Images and captions: sources, the pipeline that makes batches of them, and data sets built from packages."""

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
