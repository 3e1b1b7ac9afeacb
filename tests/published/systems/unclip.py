"""unCLIP: Karlo's prior, decoder and upsampler."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.convert import convert, restore
from t2i_jax.models.diffusion import Diffusion, join_inputs
from t2i_jax.noise import gaussian
from t2i_jax.sampling import guidance
from tests.published.parity import Oracle
from tests.published.systems.gaussian import ours_layout, theirs_layout, trajectory


def caption_of(inputs: dict[str, Any]) -> dict[str, jax.Array]:
    """The fields of a batch that a caption and an empty one make, the embedding of each first."""
    whole = lambda name: jnp.concatenate([inputs[f"{name}emb"][:, None], inputs[f"{name}seq"]], 1)
    mask = jnp.asarray(inputs["text_mask"])
    return {"features": whole("text_"), "null_features": whole("null_text_"), "text_mask": mask}


def empty_tokens(inputs: dict[str, Any]) -> int:
    """Tokens of the empty caption."""
    return int(inputs["null_text_mask"][0].sum())


def sampled(config: Diffusion, network: Callable[..., Any], spacing: str, scale: float, x: Any, noise: Any) -> Any:
    """x after every step of a guided sampler; network: (x, original t) -> outputs with the condition and without."""
    few = config.process.tables.respaced(spacing)
    variance = "learned_range" if config.network.learn_variance else config.variance

    def step(x, t, network_t, noise):
        out, null = network(x, network_t)
        prediction, v = config._parts(out)
        if null is not None:
            prediction = guidance.guide(prediction, config._parts(null)[0], scale, config.guided_channels)
        bound = {"clip": True, "clip_range": config.clip_range}
        p = gaussian.p_mean_variance(few, prediction, x, t, v=v, predicts=config.predicts, variance=variance, **bound)
        return gaussian.ddpm_step(p, t, noise)

    return trajectory(few, step, x, noise)


def gradients(name: str, config: Diffusion, model: Any, *arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The losses of each example, and the gradients of the mean squared error under the published names."""

    def objective(model):
        losses = config.losses(model, *arguments)
        return losses["mse"].mean(), losses

    slopes, losses = jax.jit(jax.grad(objective, has_aux=True))(model)
    return losses, {f"grad.{k}": v for k, v in restore(name, config, slopes).items()}


def karlo_prior(oracle: Oracle) -> dict[str, Any]:
    meta, inputs = oracle.config, oracle.inputs
    config, model = convert("karlo_prior", oracle.tensors, heads=meta["xf_heads"], null_tokens=empty_tokens(inputs))
    batch, t = caption_of(inputs), jnp.asarray(inputs["t"])
    x, x0, eps, start = (jnp.asarray(inputs[k])[:, None, None] for k in ("x", "x0", "eps", "noise_init"))
    noise, nobody = jnp.asarray(inputs["noise_steps"])[:, :, None, None], jnp.zeros(len(x), bool)
    flat = lambda x: x[..., 0, 0, :]

    @jax.jit
    def run():
        context, null = model.read(batch, nobody), model.read(batch, ~nobody)
        both = lambda x, t: (model(x, t, context), model(x, t, null))
        out = dict(zip(("model_out", "model_out_null"), map(flat, both(x, t)), strict=True))
        out["q_sample"] = flat(gaussian.q_sample(config.process.tables, x0, t, eps))
        made = flat(sampled(config, both, str(meta["respacing"]), meta["scale"], start, noise)[-1])
        return out | {"sample": made * inputs["clip_std"] + inputs["clip_mean"]}

    losses, slopes = gradients("karlo_prior", config, model, x0, t, eps, batch, nobody)
    few = config.process.tables.respaced(str(meta["respacing"]))
    ours = dict(run()) | slopes | {"loss": losses["mse"], "betas": few.betas, "timestep_map": few.timestep_map}
    return {k: np.asarray(v) for k, v in ours.items()}


def karlo_decoder(oracle: Oracle) -> dict[str, Any]:
    meta, inputs = oracle.config, oracle.inputs
    hints = {"size": meta["image_size"], "blocks": meta["num_res_blocks"], "head_dim": meta["num_head_channels"]}
    hints |= {"length": meta["text_ctx"], "null_tokens": empty_tokens(inputs)}
    config, model = convert("karlo_decoder", oracle.tensors, **hints)
    batch, t = caption_of(inputs) | {"image_features": jnp.asarray(inputs["image_emb"])}, jnp.asarray(inputs["t"])
    x, x0, eps, start = (ours_layout(inputs[k]) for k in ("x", "x0", "eps", "noise_init"))
    noise, nobody = ours_layout(inputs["noise_steps"]), jnp.zeros(len(x), bool)

    @jax.jit
    def run():
        context, null = model.read(batch, nobody), model.read(batch, ~nobody)
        both = lambda x, t: (model(x, t, context), model(x, t, null))
        out = dict(zip(("model_out", "model_out_null"), both(x, t), strict=True))
        out["sample"] = sampled(config, both, str(meta["respacing"]), meta["scale"], start, noise)[-1]
        return {k: theirs_layout(v) for k, v in out.items()}

    losses, slopes = gradients("karlo_decoder", config, model, x0, t, eps, batch, nobody)
    few = config.process.tables.respaced(str(meta["respacing"]))
    ours = dict(run()) | slopes | {"loss_mse": losses["mse"], "timestep_map": few.timestep_map}
    return {k: np.asarray(v) for k, v in ours.items()}


def karlo_sr(oracle: Oracle) -> dict[str, Any]:
    meta, inputs = oracle.config, oracle.inputs
    config, model = convert("karlo_sr", oracle.tensors, size=meta["size"], blocks=meta["depth"])
    x, start, noise = (ours_layout(inputs[k]) for k in ("x", "noise_init", "noise_steps"))
    t, batch = jnp.asarray(inputs["t"]), {"low_res": ours_layout(inputs["image_small"])}

    @jax.jit
    def run():
        read = lambda x: join_inputs(x, batch, config.network.extra_inputs, config.network.upscaling)
        context = model.read(batch, jnp.zeros(len(x), bool))
        both = lambda x, t: (model(read(x), t, context), None)
        out = {"low_res": read(x)[..., x.shape[-1] :]}
        of = lambda n: jax.tree.map(lambda y: y[n], context)
        out |= {"model_first": model.first(read(x), t, of(0)), "model_last": model.last(read(x), t, of(1))}
        out["traj"] = sampled(config, both, str(meta["respacing"]), 1.0, start, noise)
        return {k: theirs_layout(v) for k, v in out.items()}

    few = config.process.tables.respaced(str(meta["respacing"]))
    return {k: np.asarray(v) for k, v in run().items()} | {"timestep_map": few.timestep_map}


SYSTEMS = {"karlo_prior": karlo_prior, "karlo_decoder": karlo_decoder, "karlo_sr": karlo_sr}
