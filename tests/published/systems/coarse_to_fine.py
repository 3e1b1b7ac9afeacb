"""CogView2: coarse codes, direct and iterative super-resolution."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.convert import convert, restore
from t2i_jax.interop.cogview2 import LABELS
from t2i_jax.models.coarse_to_fine import CoarseToFine
from t2i_jax.sampling.options import CoarseToFineSampler
from tests.published.parity import Oracle


def cogview2(oracle: Oracle) -> dict[str, Any]:
    meta, inputs = oracle.config, oracle.inputs
    config, model = convert(
        "cogview2",
        {**oracle.tensors, LABELS: inputs["cluster_labels"]},
        heads=meta["heads"],
        coarse_grid=(meta["coarse"], meta["coarse"]),
        codes=meta["image_vocab"],
        image_place=meta["coarse_position"] + 1,
        start_of_image=meta["start_of_image"],
        text_length=meta["text_pad"],
        direct_text=meta["text_pad"],
        refiner_text=meta["iter_text"],
        window=meta["kernel"],
        top_ks=tuple(meta["topks"][1:7]),
        one_softmax=False,
    )
    options = CoarseToFineSampler(
        temperature=meta["temp_all_gen"],
        text_weight=meta["attn_plus"],
        top_clusters=meta["topk_gen"],
        cluster_temperature=meta["temp_cluster_gen"],
        direct_top_clusters=meta["topk_dsr"],
        direct_cluster_temperature=meta["temp_cluster_dsr"],
    )
    config.check(options)
    b, (text, padded) = len(inputs["coarse_ids"]), (inputs["text"] - meta["image_vocab"], meta["text_pad"])
    condition = {
        "text": jnp.tile(np.pad(text, (0, padded - len(text))), (b, 1)),
        "text_mask": jnp.tile(np.arange(padded) < len(text), (b, 1)),
        "low_codes": jnp.asarray(inputs["coarse_ids"]).reshape(b, *config.coarse.grid),
    }
    return coglm(oracle, config, model, condition, options) | fine(oracle, config, model, condition, options)


def rows_of(table: np.ndarray, vectors: Any) -> np.ndarray:
    """The rows of a table that vectors (n, d) are, as numbers."""
    return np.asarray([np.abs(table - vector).sum(1).argmin() for vector in np.asarray(vectors)])


def coglm(
    oracle: Oracle, config: CoarseToFine, model: Any, condition: dict[str, Any], options: CoarseToFineSampler
) -> dict[str, Any]:
    """The arrays of the first stage; its text is padded here, so rows and columns of padding are left out."""
    inputs, stream, network = oracle.inputs, config.coarse, model.coarse
    codes, none = condition["low_codes"], jnp.zeros(len(condition["text"]), bool)
    b, t, n = len(codes), len(inputs["text"]), stream.length
    real = stream.condition.real(condition, none)
    condition = {k: v for k, v in condition.items() if k != "low_codes"}

    def logits(model, weight=None):
        weight = None if weight is None else jnp.full(b, weight)
        ids = stream.condition(condition, none)
        return model.image_logits(model(ids, codes, real=real, text_weight=weight)[1])

    def loss(network):
        return stream.loss(network, condition | {"codes": codes}, jax.random.key(0), False).loss

    @jax.jit
    def sampled(network, uniform):
        with_weight = stream.with_options(condition, options, b)
        first, state = network.prefill(with_weight, none)
        pick = lambda logits, i: stream.draw(network, logits, options, uniform[i])

        def step(carry, i):
            state, code = carry
            logits, state = network.decode(state, code, i)
            code = pick(logits, i + 1)
            return (state, code), code

        start = pick(first, 0)
        _, rest = jax.lax.scan(step, (state.grow(n), start), jnp.arange(n - 1))
        return jnp.concatenate([start[None], rest]).T

    value, slopes = jax.jit(jax.value_and_grad(loss, allow_int=True))(network)
    whole = jax.tree.map(jnp.zeros_like, model)
    whole.coarse = jax.tree.map(lambda x, g: x if g.dtype == jax.dtypes.float0 else g, whole.coarse, slopes)
    slopes = restore("cogview2", config, whole)
    places = jnp.concatenate([network.prefix_places()[:t], network.prefix_places()[-1:], network.cells()])
    mask = network.causal(real, network.prefix + n)
    kept = np.r_[:t, network.prefix - 1 : network.prefix + n]
    return {
        "coglm_position_ids": rows_of(oracle.tensors["coglm.transformer.position_embeddings.weight"], places),
        "coglm_mask": np.asarray(mask.dense(network.prefix + n))[0, 0][kept][:, kept],
        "coglm_logits": jax.jit(logits)(network, options.text_weight),
        "coglm_logits_plain": jax.jit(logits)(network),
        "coglm_loss": value,
        "coglm_tokens": sampled(network, jnp.asarray(inputs["coglm_uniform"]).reshape(n, 2, b)),
        **{name: slopes[name.removeprefix("grad.")] for name in oracle.outputs if name.startswith("grad.")},
    }


def fine(
    oracle: Oracle, config: CoarseToFine, model: Any, condition: dict[str, Any], options: CoarseToFineSampler
) -> dict[str, Any]:
    """The arrays of the other stages; padding is before text in the published sequence, and after it here."""
    meta, inputs, direct = oracle.config, oracle.inputs, model.direct
    b, t, padded, n = len(condition["text"]), len(inputs["text"]), meta["text_pad"], config.length
    coarse, real = condition["low_codes"], condition["text_mask"]
    order = np.r_[t:padded, :t, padded : padded + coarse[0].size]
    hidden, nothing = jnp.ones((b, *config.grid), bool), jnp.zeros((b, *config.grid), jnp.int32)
    uniform = inputs["dsr_uniform"].reshape(2, b, -1)[:, :, -n:]

    tokens = jax.jit(config.enlarge)(model, condition, coarse, options, jnp.asarray(uniform))
    found = {
        "dsr_logits": jax.jit(config.logits)(direct, condition, coarse, nothing, hidden),
        "dsr_tokens": np.asarray(tokens).reshape(b, n),
        "dsr_mask": np.asarray(direct.mask(real))[0, 0][order][:, order],
        "itersr_mask_values": config.rounds,
        "itersr_logits1": jax.jit(config.logits)(
            model.refiner, condition, coarse, tokens, config.hidden(jnp.ones(b, jnp.int32))
        ),
    }
    refine, path = jax.jit(config.refine), []
    for round in range(1, len(config.top_ks) + 1):
        uniform = inputs[f"itersr_uniform{round}"].reshape(b, -1)[:, -n:]
        tokens = refine(model, condition, tokens, jnp.asarray(round), options, jnp.asarray(uniform))
        path.append(np.asarray(tokens).reshape(b, n))

    tables = [oracle.tensors[f"dsr.{name}.weight"] for name in ("transformer.position_embeddings", EXTRA)]
    first = direct.places[:t], direct.places[direct.first : direct.first + coarse[0].size]
    places = [rows_of(tables[0], jnp.concatenate(first)), rows_of(tables[1], direct.fine_places) + len(tables[0])]
    ids = [condition["text"] + meta["image_vocab"], coarse.reshape(b, -1)]
    start = np.full((b, n), meta["image_vocab"] + direct.config.hidden)
    return found | {
        "dsr_position_ids": np.concatenate([np.zeros(padded - t, int), *places]),
        "dsr_input": np.concatenate([np.zeros((b, padded - t), int), ids[0][:, :t], ids[1], start], 1),
        "itersr_tokens_traj": np.stack(path),
    }


EXTRA = "mixins.extra_position_embedding.position_embeddings"
SYSTEMS = {"cogview2": cogview2}
