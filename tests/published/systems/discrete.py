"""Discrete diffusion: VQ-Diffusion with captions, with classes, with neither."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.convert import convert, restore
from t2i_jax.core.family import with_fields
from t2i_jax.models.vq_diffusion import VQDiffusion, guided_log, truncate_log_probs
from t2i_jax.noise.discrete import Chain, ChainSchedule, gumbel, importance, one_hot
from t2i_jax.sampling.discrete import reverse
from t2i_jax.sampling.options import DiscreteSampler
from tests.published.parity import Oracle

NAMES = {"at": "a", "bt": "b", "ct": "c", "att": "alpha_bar", "btt": "beta_bar", "ctt": "gamma_bar"}


def vq_diffusion(oracle: Oracle) -> dict[str, Any]:
    meta, inputs, outputs = oracle.config, {k: jnp.asarray(v) for k, v in oracle.inputs.items()}, oracle.outputs
    config, model = described(oracle)
    chain = config.chain
    x0, x_t, t = inputs["x0"], inputs["x_t"], inputs["t"]
    b = len(x0)
    ours = schedules(chain, outputs)

    batch, null = conditions(config, inputs, b)
    embedded = lambda model, batch, dropped: model.read(batch, jnp.full(b, dropped))
    classes_first = lambda x: jnp.moveaxis(x, -1, 1)
    options = DiscreteSampler(guidance=meta["guidance"], truncation=meta["truncation"])

    @jax.jit
    def distributions(model):
        cond, uncond = embedded(model, batch, False), embedded(model, null, True)
        logits = [model.logits(model(x_t, t, embedded)) for embedded in (cond, uncond)]
        log_x0, log_null = (model.log_x0(x_t, t, embedded) for embedded in (cond, uncond))
        start, seen = one_hot(x0, chain.codes + 1), one_hot(x_t, chain.codes + 1)
        arrays = {
            "logits": logits[0],
            "logits_null": logits[1],
            "log_x0_recon": log_x0,
            "q_pred": chain.q_start(start, t),
            "q_pred_one": chain.q_step(seen, t, published=True),
            "q_posterior_true": chain.posterior(start, x_t, t),
            "q_posterior_model": chain.posterior(log_x0, x_t, t),
            "log_x0_guided": guided_log(log_x0, log_null, meta["guidance"]),
            "log_x0_truncated": truncate_log_probs(log_x0, DiscreteSampler(truncation=meta["truncation"])),
        }
        for name in outputs:
            if found := re.fullmatch(r"log_x0_top(\d+)p", name):
                arrays[name] = truncate_log_probs(log_x0, DiscreteSampler(top_k=int(found[1])))
        arrays = {k: classes_first(v) for k, v in arrays.items()}
        uniform = jnp.moveaxis(inputs["q_sample_uniform"], 1, -1)
        return arrays | {"q_sample": gumbel_max(chain.q_start(start, t), uniform)}

    ours |= distributions(model)
    ours |= losses(oracle, config, model, batch)
    ours["importance_pt"] = importance(inputs["Lt_history_given"])

    draw_all = sampler(config, batch, null, inputs["sample_uniform"]) if "sample_uniform" in inputs else None
    for name, wanted in {
        "plain": DiscreteSampler(guidance=1.0),
        "truncated": DiscreteSampler(guidance=1.0, truncation=meta["truncation"]),
        "guided_truncated": options,
        f"fast_skip{meta['skip_step']}": dataclasses.replace(options, stride=meta["skip_step"] + 1),
    }.items():
        if f"traj_{name}" in outputs and draw_all is not None:
            codes, steps = draw_all(model, wanted)
            ours |= {f"sample_{name}": codes, f"traj_{name}": steps}
    return {k: v for k, v in ours.items() if k in outputs}


def described(oracle: Oracle) -> tuple[VQDiffusion, Any]:
    """Configuration and model, what the shapes cannot tell taken from the published configuration."""
    meta = oracle.config
    hints: dict[str, Any] = {
        "grid": tuple(meta["spatial"]),
        "heads": meta["n_head"],
        "steps": meta["T"],
        "activation": meta.get("activation") or "GELU",
        "class_type": meta.get("class_type") or "adalayernorm",
    }
    if meta.get("condition_len"):
        hints["length"] = meta["condition_len"]
    if meta.get("class_number"):
        hints["null_class"] = bool((oracle.inputs["null_cond"] < meta["class_number"]).all())
    config, model = convert("vq_diffusion", oracle.tensors, **hints)
    weights = {"aux_loss_weight": meta["aux_weight"], "adaptive": meta["adaptive_aux"]}
    weights["mask_weight"] = tuple(meta.get("mask_weight") or (1, 1))
    return with_fields(config, **weights), model


def schedules(chain: Chain, outputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """The schedule, others that are asked for by name, and the logs that the published program keeps."""
    found: dict[str, Any] = {}
    for name in outputs:
        if match := re.fullmatch(r"schedule_(?:T(\d+)_K(\d+)_)?(\w+)", name):
            of = Chain(int(match[2]), int(match[1])) if match[1] else chain
            found[name] = getattr(of.schedule, NAMES[match[3]])
    s: ChainSchedule = chain.schedule
    with np.errstate(divide="ignore"):
        for ours, theirs in (("a", "at"), ("b", "bt"), ("c", "ct")):
            found[f"buf_log_{theirs}"] = np.log(getattr(s, ours)).astype(np.float32)
        for ours, theirs in (("alpha_bar", "at"), ("beta_bar", "bt"), ("gamma_bar", "ct")):
            found[f"buf_log_cumprod_{theirs}"] = np.log(getattr(s, ours)).astype(np.float32)
    found["buf_log_1_min_ct"] = np.log1p(-s.c).astype(np.float32)
    found["buf_log_1_min_cumprod_ct"] = np.asarray(chain.tables().unmasked)
    return found


def conditions(config: VQDiffusion, inputs: dict[str, jax.Array], b: int) -> tuple[dict, dict]:
    """What the model is conditioned on, and what it is conditioned on where it is dropped."""
    if "cond" not in inputs:
        return {}, {}
    if inputs["cond"].ndim == 1:
        return ({"label": inputs["cond"]},) * 2
    batch = {"features": inputs["cond"]}
    null = jnp.broadcast_to(inputs["null_cond"], inputs["cond"].shape)
    return batch, {"features": null}


def losses(oracle: Oracle, config: VQDiffusion, model: Any, batch: dict[str, jax.Array]) -> dict[str, Any]:
    inputs, outputs, found = oracle.inputs, oracle.outputs, {}
    x0, x_t, t = (jnp.asarray(inputs[name]) for name in ("x0", "x_t", "t"))

    def objective(model, p):
        embedded = model.read(batch, jnp.zeros(len(x0), bool))
        terms = config.bound(model, embedded, x0, x_t, t, p)
        return terms.loss.sum() / x0.size, terms

    run = jax.jit(jax.value_and_grad(objective, has_aux=True))
    last = jnp.asarray([i == np.flatnonzero(inputs["t"] == inputs["t"][i])[-1] for i in range(len(x0))])
    for name in ("uniform", "importance"):
        if f"train_vb_{name}" not in outputs:
            continue
        what = oracle.meta["outputs"][f"train_vb_{name}"]["what"]
        p = jnp.asarray([float(x) for x in re.findall(r"p_t=\[(.*?)\]", what)[0].split(",")])
        (loss, terms), slopes = run(model, p)
        found |= {f"train_vb_{name}": terms.loss, f"train_loss_{name}": loss}
        fresh = jax.tree.map(jnp.zeros_like, model)  # of several rows at one time the published program keeps the last
        found[f"Lt_history_{name}"] = config.remembered(fresh, t, terms.size, last).history[...]
        wanted = re.compile(rf"d train_loss_{name}")
        restored = restore("vq_diffusion", config, slopes)
        for key, about in oracle.meta["outputs"].items():
            if key.startswith("grad.") and wanted.search(about["what"]):
                found[key] = restored[key.removeprefix("grad.")]
    return found


def gumbel_max(log_p: jax.Array, uniform: jax.Array) -> jax.Array:
    """The published draw, from a uniform number for each class: both (..., k) -> int (...)."""
    return jnp.argmax(log_p + gumbel(uniform), -1)


def sampler(
    config: VQDiffusion, batch: dict[str, jax.Array], null: dict[str, jax.Array], uniform: jax.Array
) -> Callable[[Any, DiscreteSampler], tuple[np.ndarray, np.ndarray]]:
    """The library's loop fed with given uniform numbers, all masked at first: the codes, and those after every step."""
    b = uniform.shape[1]
    seen: dict[int, np.ndarray] = {}

    @jax.jit
    def run(model, options):
        cond = model.read(batch, jnp.zeros(b, bool))
        uncond = model.read(null, jnp.ones(b, bool))

        def guess(x, t, share):
            log_p = model.log_x0(x, t, cond)
            guided = guided_log(log_p, model.log_x0(x, t, uncond), options.guidance)
            return truncate_log_probs(jnp.where(options.guidance == 1, log_p, guided), options)

        noise = lambda i: (jnp.moveaxis(uniform[i], 1, -1), jnp.zeros((b, config.length)))
        start = jnp.full((b, config.length), config.chain.codes)
        note = lambda i, x: seen.__setitem__(int(i), np.asarray(x))
        report = lambda i, count, x, _: jax.debug.callback(note, i, x)
        return reverse(config.chain, guess, start, noise, options, report=report, draw_code=gumbel_max)

    def draw_all(model: Any, options: DiscreteSampler) -> tuple[np.ndarray, np.ndarray]:
        seen.clear()
        codes = np.asarray(run(model, options.arrays()))
        jax.effects_barrier()
        return codes, np.stack([seen[i + 1] for i in range(len(seen))])

    return draw_all


SYSTEMS = {"vq_diffusion": vq_diffusion, "vq_diffusion_class": vq_diffusion}
