"""Next-token models: LlamaGen."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parity import Oracle

from t2i_jax.convert import convert, restore
from t2i_jax.nn.draw import Sampling, guide, truncate


def llamagen(oracle: Oracle) -> dict[str, Any]:
    meta, inputs, outputs = oracle.config, oracle.inputs, oracle.outputs
    config, model = convert(
        "llamagen", oracle.tensors, grid=(meta["grid"], meta["grid"]), head_dim=meta["dim"] // meta["n_head"]
    )
    b = len(inputs["ids"])
    if meta["model_type"] == "c2i":
        condition = {"label": jnp.asarray(inputs["labels"])}
    else:
        features, mask = inputs["t5_embeddings_right_padded"], inputs["t5_mask_right_padded"]
        condition = {"features": jnp.asarray(features), "text_mask": jnp.asarray(mask) == 1}
    batch = condition | {"codes": jnp.asarray(inputs["ids"]).reshape(-1, *config.grid)}
    dropped = jnp.asarray(inputs["cond_drop_uniform"] < meta["class_dropout_prob"])
    weight = jnp.asarray(inputs.get("valid", np.ones(b)))

    def objective(model):
        logits = config.forward(model, batch, dropped)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(inputs["ids"])[..., None], 2)[..., 0]
        return (nll.mean(1) * weight).sum() / weight.sum(), logits

    (loss, logits), slopes = jax.jit(jax.value_and_grad(objective, has_aux=True))(model)
    ours = {"train_logits": logits, "train_loss": loss}
    ours |= {f"grad.{k}": v for k, v in restore("llamagen", config, slopes).items() if f"grad.{k}" in outputs}

    keys = jax.random.split(jax.random.key(0), b)
    stop = (meta["cfg_interval"] + 2) / config.length
    for name, options in {
        "nocfg": Sampling(guidance=1.0, greedy=True),
        "cfg": Sampling(guidance=meta["cfg_scale"], greedy=True),
        "cfg_interval": Sampling(guidance=meta["cfg_scale"], guidance_stop=stop, greedy=True),
    }.items():
        codes = config.sample(model, condition, keys, options, segments=2)
        ours[f"greedy_tokens_{name}"] = np.asarray(codes).reshape(b, -1)

    @jax.jit
    def decoded(codes, dropped):
        first, state = config.prefill(model, condition, jnp.full(b, dropped))

        def step(state, i):
            logits, state = config.decode(state, jnp.asarray(codes)[:, i], i)
            return state, logits

        _, rest = jax.lax.scan(step, state.grow(config.length), jnp.arange(config.length - 1))
        return jnp.concatenate([first[:, None], jnp.moveaxis(rest, 0, 1)], 1)

    ours["greedy_logits_nocfg"] = decoded(outputs["greedy_tokens_nocfg"], False)
    branches = [decoded(outputs["greedy_tokens_cfg"], dropped) for dropped in (False, True)]
    ours["greedy_logits_cfg_cond"], ours["greedy_logits_cfg_uncond"] = branches
    ours["greedy_logits_cfg_combined"] = guide(*branches, meta["cfg_scale"])
    ours |= {"prefill_logits": branches[0][:, :1], "prefill_logits_uncond": branches[1][:, :1]}

    for name in outputs:
        if name.startswith("filtered_probs"):
            k, p, t = (float(part[1:]) for part in name.split("_")[2:])
            weights = truncate(jnp.asarray(inputs["filter_logits"]), t, int(k), p)
            ours[name] = weights / weights.sum(-1, keepdims=True)
    s = config.condition.length
    ours["freqs_cis"] = jnp.stack(config._rotary(s, 0, s + config.length), -1)
    return ours


SYSTEMS = {"llamagen_c2i": llamagen, "llamagen_t2i": llamagen}
