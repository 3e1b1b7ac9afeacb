"""Which parameters Muon moves and which decay, over all families; runs begun under another rule go on."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from t2i_jax.core.params import abstract
from t2i_jax.nn.batch_norm import BatchNorm
from t2i_jax.nn.layers import GroupNorm, LayerNorm, Linear, RMSNorm
from t2i_jax.training import optimizer
from t2i_jax.training.loop import train
from t2i_jax.training.optimizer import Optimizer, axes_of, muon_dimensions
from t2i_jax.training.state import params_of
from tests.fixtures.families import ALL, FAMILIES
from tests.fixtures.toys import experiment

NORMS = (BatchNorm, GroupNorm, LayerNorm, RMSNorm)
FREE = r"null|codebook|position|padding|norm\d?\.[wb]$|rows|columns|target|mask_token|start|places|\.b$|_bias$|cells"
"""Names of what stands for itself: nothing multiplies by it."""


def modules(model, kind):
    """Names of all modules of a kind."""
    return {".".join(map(str, path)) for path, module in nnx.iter_graph(model) if isinstance(module, kind)}


@pytest.mark.parametrize("name", ALL)
def test_muon_moves_the_matrices_of_products_alone(name):
    model = abstract(ALL[name])
    params = params_of(model)
    moved = {k for k, dimensions in muon_dimensions(params).items() if dimensions is not None}
    linear = {f"{m}.w" for m in modules(model, Linear)}
    assert moved <= linear
    assert {k for k in linear if "vocab" not in axes_of(params[k])} == moved
    assert not [k for k in moved if re.search(FREE, k)]


LISTED = Path(__file__).parent / "assets" / "optimizers.json"


def listed(name):
    """Of a family, which parameters Muon moves, which of the others decay, and which do not."""
    params = params_of(abstract(ALL[name]))
    moved = {k for k, dimensions in muon_dimensions(params).items() if dimensions is not None}
    decayed = {k for k, yes in Optimizer().decayed(params).items() if yes}
    sets = {"muon": moved & decayed, "adam, decays": decayed - moved, "adam": params.keys() - moved - decayed}
    assert moved <= decayed
    return {kind: sorted(names) for kind, names in sets.items()}


@pytest.mark.parametrize("name", ALL)
def test_who_goes_where_is_as_it_is_listed(name):
    """`python -m tests.test_optimizer` writes the list anew: look at what changes in it."""
    assert listed(name) == json.loads(LISTED.read_text())[name]


@pytest.mark.parametrize("name", ALL)
def test_what_stands_for_itself_does_not_decay(name):
    model = abstract(ALL[name])
    params = params_of(model)
    decayed = {k for k, yes in Optimizer().decayed(params).items() if yes}
    norms = {f"{m}.w" for m in modules(model, NORMS)}
    read = {k for k in params if k.endswith(".w")} - norms
    untied = {k for k in params if re.fullmatch(r"(prior\.)?output|(text|image)_head", k)}
    assert decayed == {k for k in read | untied if "codebook" not in k}
    assert not [k for k in decayed if re.search(FREE, k)]


def test_who_goes_where_in_a_transformer():
    params = params_of(abstract(FAMILIES["masked-flow"]))
    moved = {k for k, dimensions in muon_dimensions(params).items() if dimensions is not None}
    block = ("attention.qkv", "attention.out", "mlp.into", "mlp.out")
    stacks = {f"{stack}.{m}.w" for stack in ("encoder", "decoder") for m in block}
    head = ("blocks.into", "blocks.out", "blocks.modulation", "condition", "modulation", "time.out")
    head += ("into", "out", "time.into")
    assert moved == stacks | {f"head.{m}.w" for m in head} | {
        "condition.into.w",
        "condition.out.w",
        "entrance.w",
        "widen.w",
    }
    decayed = {k for k, yes in Optimizer().decayed(params).items() if yes}
    assert decayed == moved


def test_a_run_of_an_older_rule_goes_on(tmp_path, monkeypatch, capsys):
    muon = Optimizer("muon", 1e-2, warmup=0, schedule="constant")
    train(experiment(steps=3, optimizer=muon), tmp_path)
    monkeypatch.setattr(optimizer, "muon_dimensions", lambda params: {k: None for k in params})
    state = train(experiment(steps=6, optimizer=muon), tmp_path)
    assert int(state.step) == 6
    assert "start anew" in capsys.readouterr().err
    assert all(np.isfinite(v[...]).all() for v in state.params.values())


if __name__ == "__main__":
    LISTED.write_text(json.dumps({name: listed(name) for name in ALL}, indent=1) + "\n")
