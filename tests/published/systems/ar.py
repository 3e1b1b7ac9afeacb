"""Next-token models: LlamaGen, minGPT of taming-transformers, CLIP-GEN, Image GPT."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.convert import convert, restore
from t2i_jax.core.image_files import to_uint8
from t2i_jax.networks.condition import CrossAttnFeatures, PrefixTokens
from t2i_jax.nn.attention import Causal
from t2i_jax.nn.losses import cross_entropy
from t2i_jax.nn.transformer import unstack
from t2i_jax.sampling.guidance import guide
from t2i_jax.sampling.options import ARSampler
from t2i_jax.sampling.tokens import filter_logits
from tests.published.parity import Oracle


def llamagen(oracle: Oracle) -> dict[str, Any]:
    meta, inputs, outputs = oracle.config, oracle.inputs, oracle.outputs
    side = math.isqrt(meta["block_size"])
    config, model = convert(
        "llamagen",
        oracle.tensors,
        grid=(side, side),
        head_dim=meta["dim"] // meta["n_head"],
        rotary_base=float(meta["rope_base"]),
        eps=meta["norm_eps"],
        null=meta["model_type"] != "c2i" or meta["class_dropout_prob"] > 0,
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
        logits = model.logits(model(batch, dropped))
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(inputs["ids"])[..., None], 2)[..., 0]
        return (nll.mean(1) * weight).sum() / weight.sum(), logits

    (loss, logits), slopes = jax.jit(jax.value_and_grad(objective, has_aux=True))(model)
    ours = {"train_logits": logits, "train_loss": loss}
    ours |= {f"grad.{k}": v for k, v in restore("llamagen", config, slopes).items() if f"grad.{k}" in outputs}

    keys = jax.random.split(jax.random.key(0), b)
    # The published program guides by scales above 1 only, and the whole sequence where the interval is negative.
    scale, interval = max(meta["cfg_scale"], 1.0), meta["cfg_interval"]
    stop = (interval + 2) / config.length if interval >= 0 else 1.0
    for name, options in {
        "nocfg": ARSampler(guidance=1.0, greedy=True),
        "cfg": ARSampler(guidance=scale, greedy=True),
        "cfg_interval": ARSampler(guidance=scale, guidance_stop=stop, greedy=True),
    }.items():
        if f"greedy_tokens_{name}" in outputs:
            codes = config.sample(model, condition, keys, options, segments=2)
            ours[f"greedy_tokens_{name}"] = np.asarray(codes).reshape(b, -1)

    @jax.jit
    def decoded(codes, dropped):
        first, state = model.prefill(condition, jnp.full(b, dropped))

        def step(state, i):
            logits, state = model.decode(state, jnp.asarray(codes)[:, i], i)
            return state, logits

        _, rest = jax.lax.scan(step, state.grow(config.length), jnp.arange(config.length - 1))
        return jnp.concatenate([first[:, None], jnp.moveaxis(rest, 0, 1)], 1)

    if "greedy_tokens_nocfg" in outputs:
        ours["greedy_logits_nocfg"] = decoded(outputs["greedy_tokens_nocfg"], False)
    if "greedy_tokens_cfg" in outputs:
        branches = [decoded(outputs["greedy_tokens_cfg"], dropped) for dropped in (False, True)]
        ours["greedy_logits_cfg_cond"], ours["greedy_logits_cfg_uncond"] = branches
        ours["greedy_logits_cfg_combined"] = guide(*branches, meta["cfg_scale"])
    read = jax.jit(lambda dropped: model.logits(model.prefix(condition, jnp.full(b, dropped))[0]))
    ours |= {"prefill_logits": read(False), "prefill_logits_uncond": read(True)}

    ours |= filtered(oracle)
    s = config.conditioning.what.length
    ours["freqs_cis"] = jnp.stack(model.rotary(s, 0, s + config.length), -1)
    if meta["model_type"] != "c2i":
        valid = model.condition(condition, jnp.zeros(b, bool))[1]
        whole = jnp.pad(valid, ((0, 0), (0, config.length)), constant_values=True)
        ours["train_attn_mask"] = model.causal(whole, whole.shape[1]).dense(whole.shape[1])[:, 0]
    return ours


def filtered(oracle: Oracle) -> dict[str, Any]:
    """What is left of `filter_logits` after each published combination of top-k, top-p and temperature."""

    def number(name: str, letter: str, default: float) -> float:
        part = next((p[1:] for p in name.split("_")[2:] if p[0] == letter), "None")
        return default if part == "None" else float(part)

    ours = {}
    for name in oracle.outputs:
        if name.startswith("filtered_probs"):
            k, p, t = number(name, "k", 0), number(name, "p", 1.0), number(name, "t", 1.0)
            weights = filter_logits(jnp.asarray(oracle.inputs["filter_logits"]), t, int(k), p)
            ours[name] = weights / weights.sum(-1, keepdims=True)
    return ours


def taming_gpt(oracle: Oracle) -> dict[str, Any]:
    """Logits at every place: explicit `embeddings`, if the folder has them, and then the tokens of `idx`."""
    inputs, outputs, unmasked = oracle.inputs, oracle.outputs, oracle.config["n_unmasked"]
    ids, vectors = jnp.asarray(inputs["idx"]), inputs.get("embeddings")
    first = 1 if vectors is None else max(unmasked - vectors.shape[1], 0)  # places that see later ones are read at once
    config, model, condition = gpt(oracle, vectors, ids[:, :first], ids.shape[1] - first + 1, unmasked)
    # The last code is one that nothing is predicted from.
    codes = jnp.concatenate([ids[:, first:], jnp.zeros_like(ids[:, :1])], 1)[:, None]

    def objective(model):
        logits = model.logits(model(condition(model) | {"codes": codes}))
        if config.prefix_length > 1:
            before = model.logits(model.prefix(condition(model), jnp.zeros(len(ids), bool))[0])
            logits = jnp.concatenate([before[:, :-1], logits], 1)
        targets = jnp.asarray(inputs["targets"])  # of all places, or of the last ones
        return cross_entropy(logits[:, -targets.shape[1] :], targets)[1].mean(), logits

    (loss, logits), slopes = jax.jit(jax.value_and_grad(objective, has_aux=True))(model)
    ours = {"logits": logits[:, -outputs["logits"].shape[1] :], "loss": loss}
    ours |= {f"grad.{k}": v for k, v in restore("taming-gpt", config, slopes).items() if f"grad.{k}" in outputs}

    # Folders do not always say whether the embeddings come before the greedy continuation too.
    ours["greedy_tokens"] = continued(oracle, None)
    if vectors is not None and not np.array_equal(ours["greedy_tokens"], outputs["greedy_tokens"]):
        ours["greedy_tokens"] = continued(oracle, vectors)
    return ours


def continued(oracle: Oracle, vectors: np.ndarray | None) -> jax.Array:
    """The greedy continuation of the first two tokens, after vectors (b, s, d) if there are any.

    Places that see each other both ways are read anew for each token; from there on they are in the cache.
    """
    unmasked, total = oracle.config["n_unmasked"], oracle.outputs["greedy_tokens"].shape[1]
    known = jnp.asarray(oracle.inputs["idx"])[:, :2]
    while known.shape[1] < total:
        s = known.shape[1] + (0 if vectors is None else vectors.shape[1])
        count = 1 if s < unmasked else total - known.shape[1]
        config, model, condition = gpt(oracle, vectors, known, count, min(s, unmasked))
        options = dataclasses.replace(config.options(), greedy=True)
        new = config.sample(model, condition(model), jax.random.split(jax.random.key(0), len(known)), options)
        known = jnp.concatenate([known, new[:, 0]], 1)
    return known


def gpt(oracle: Oracle, vectors: np.ndarray | None, known: jax.Array, count: int, unmasked: int) -> Any:
    """A model of `count` codes after the tokens `known` (b, n), or after vectors (b, s, d) and these tokens; its
    parameters; and what it is conditioned on, as a function of them."""
    before = known.shape[1] + (0 if vectors is None else vectors.shape[1])
    width = oracle.config["n_embd"]
    condition = PrefixTokens(before) if vectors is None else CrossAttnFeatures(width, before, trained_null=False)
    hints = {"heads": oracle.config["n_head"], "bidirectional_prefix": unmasked, "condition": condition}
    config, model = convert("taming-gpt", oracle.tensors, grid=(1, count), **hints)
    if vectors is None:
        return config, model, lambda model: {"prefix": known}
    return config, model, lambda model: {"features": jnp.concatenate([vectors, model.tokens(known)], 1)}


def clip_gen(oracle: Oracle) -> dict[str, Any]:
    meta, inputs, outputs = oracle.config, oracle.inputs, oracle.outputs
    length = inputs["idx"].shape[1]
    hints = {"heads": meta["n_head"], "eps": meta["layernorm_eps"]}
    config, model = convert("clipgen", oracle.tensors, grid=(1, length), **hints)
    condition = {"features": jnp.asarray(inputs["clip_embed"])}
    batch = condition | {"codes": jnp.asarray(inputs["idx"])[:, None]}

    def objective(model):
        logits = model.logits(model(batch))
        return cross_entropy(logits, batch["codes"][:, 0])[1].mean(), logits

    (loss, logits), slopes = jax.jit(jax.value_and_grad(objective, has_aux=True))(model)
    ours = {"logits": logits, "loss": loss} | filtered(oracle)
    ours |= {f"grad.{k}": v for k, v in restore("clipgen", config, slopes).items() if f"grad.{k}" in outputs}
    config, model = convert("clipgen", oracle.tensors, grid=(1, outputs["greedy_tokens"].shape[1]), **hints)
    options = dataclasses.replace(config.options(), greedy=True)
    codes = config.sample(model, condition, jax.random.split(jax.random.key(0), len(batch["codes"])), options)
    return ours | {"greedy_tokens": codes[:, 0]}


def image_gpt(oracle: Oracle) -> dict[str, Any]:
    meta, inputs, outputs = oracle.config, oracle.inputs, oracle.outputs
    config, model = convert("imagegpt", oracle.tensors, heads=meta["n_head"], eps=meta["layer_norm_epsilon"])
    colors, table = convert("imagegpt-clusters", {"clusters": inputs["clusters"]})
    ids = colors.encode(table, jnp.asarray(inputs["image"], jnp.float32) / 127.5 - 1)
    ours = {"ids": ids.reshape(len(ids), -1), "picture": to_uint8(colors.decode(table, ids))}
    batch = {"codes": jnp.asarray(outputs["ids"]).reshape(-1, *config.grid)}
    nobody = jnp.zeros(len(ids), bool)

    def objective(model):
        logits = model.logits(model(batch, nobody))
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(outputs["ids"])[..., None], 2)
        return nll.mean(), logits

    @jax.jit
    def first(model):
        x = jnp.concatenate([model.read({}, nobody).tokens, model.embed(jnp.asarray(outputs["ids"])[:, :-1])], 1)
        return unstack(model.blocks)[0](model.add_positions(x, 0), mask=Causal(None, 1))[0]

    (loss, logits), slopes = jax.jit(jax.value_and_grad(objective, has_aux=True))(model)
    keys, greedy = jax.random.split(jax.random.key(0), len(ids)), ARSampler(guidance=1.0, greedy=True)
    ours |= {"loss": loss, "logits": logits, "block_out": first(model)}
    ours["greedy_tokens"] = config.sample(model, {}, keys, greedy).reshape(len(ids), -1)
    return ours | {f"grad.{k}": v for k, v in restore("imagegpt", config, slopes).items()}


SYSTEMS = {
    "llamagen_c2i": llamagen,
    "llamagen_t2i": llamagen,
    "taming_gpt": taming_gpt,
    "clip_gen": clip_gen,
    "imagegpt": image_gpt,
}
