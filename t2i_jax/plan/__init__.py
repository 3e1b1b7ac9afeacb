"""The needs of a run, before it is started: `t2i plan CONFIG --topology v5p:4x4x4`.

For TPUs the real train step is compiled by the real compiler, without chips (`compiled`); for GPUs, and to choose what
a sweep compiles, the same step is counted (`estimate`). The report says which figure comes from which.
"""

from t2i_jax.core.sharding import read_mesh
from t2i_jax.plan.chips import CHIPS, Topology
from t2i_jax.plan.compiled import DoesNotFit, compile_plan, plan_by_shallow_copies
from t2i_jax.plan.estimate import estimate, trace
from t2i_jax.plan.ready import abstract_setup, batch_of, devices_of, of_size
from t2i_jax.plan.report import Plan, markdown, ranking, table
from t2i_jax.plan.run import run, write
from t2i_jax.plan.sweep import sweep

__all__ = [
    "CHIPS",
    "DoesNotFit",
    "Plan",
    "Topology",
    "abstract_setup",
    "batch_of",
    "compile_plan",
    "devices_of",
    "estimate",
    "markdown",
    "of_size",
    "plan_by_shallow_copies",
    "ranking",
    "read_mesh",
    "run",
    "sweep",
    "table",
    "trace",
    "write",
]
