"""Masked and any-order models: MAR and its KL autoencoder."""

import dataclasses
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.convert import convert, restore
from t2i_jax.nn.layers import replace
from t2i_jax.nn.tokens import from_tokens, to_tokens
from t2i_jax.sampling.options import MaskedSampler
from t2i_jax.sampling.orders import hidden_by, remaining
from tests.published.parity import Oracle

NHWC, NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


def klvae(oracle: Oracle) -> dict[str, Any]:
    meta, inputs = oracle.config, oracle.inputs
    codec, model = convert("kl", oracle.tensors, scale=meta["scale_factor"], eps=meta["groupnorm_eps"])

    @jax.jit
    def everything(model, image, noise):
        q = codec.posterior(model, image)
        recon = lambda z: codec.decode(model, (z - codec.shift) * codec.scale)
        pictures = {
            "moments": codec.moments(model, image),
            "mean": q.mean,
            "logvar": q.logvar,
            "std": q.std,
            "sample": q.sample(noise),
            "recon_mode": codec.decode(model, codec.encode(model, image)),
            "recon_sample": recon(q.sample(noise)),
        }
        return {"kl": q.kl()} | {k: jnp.transpose(v, NCHW) for k, v in pictures.items()}

    return everything(model, *(np.transpose(inputs[name], NHWC) for name in ("image", "posterior_noise")))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noise:
    """Published noise for one step's positions, in the place of random draws."""

    first: jax.Array
    steps: jax.Array

    def normal(self, i: Any, k: int) -> jax.Array:
        return jnp.where(i == 0, self.first, self.steps[jnp.maximum(i - 1, 0)])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
    """Published noise of every step and position."""

    first: jax.Array
    steps: jax.Array

    def at(self, step: Any, positions: jax.Array) -> Noise:
        take = jax.vmap(lambda rows, p: rows[p])
        return Noise(take(self.first[step], positions), jax.vmap(lambda s: take(s, positions))(self.steps[step]))


def mar(oracle: Oracle) -> dict[str, Any]:
    meta, inputs, outputs = oracle.config, oracle.inputs, oracle.outputs
    config, model = convert(
        "mar",
        oracle.tensors,
        grid=(meta["seq_h"], meta["seq_w"]),
        patch=meta["patch_size"],
        heads=meta["encoder"]["heads"],
        decoder_heads=meta["decoder"]["heads"],
        respacing=meta["num_sampling_steps"],
        eps=meta["norm_eps"],
    )
    head, length, b = config.head, config.length, len(inputs["labels"])
    batch = {
        "label": jnp.asarray(inputs["labels"]),
        "codes": jnp.transpose(inputs["latents"], NHWC),
    }
    nobody = batch | {"label": jnp.full(b, meta["class_num"])}
    hidden = jnp.asarray(inputs["mask"]) > 0.5
    x = to_tokens(batch["codes"], config.patch)
    repeats = len(inputs["diff_t"]) // (b * length)
    t, noise = jnp.asarray(inputs["diff_t"]), jnp.asarray(inputs["diff_noise"])
    rows = lambda y: jnp.tile(y.reshape(b * length, -1), (repeats, 1))
    average = lambda each: jnp.sum(each * rows(hidden)[:, 0]) / rows(hidden).sum()
    everyone = jnp.ones(b, bool)

    @jax.jit
    def training(model):
        none = jnp.zeros(b, bool)
        visible = int(length - inputs["mask"].sum(1).max())
        encoded = model.encode(*model.read(batch, none), x, hidden, visible)
        z = model(batch, hidden, visible=visible)

        def objective(head_module, z):
            terms = head.terms(head_module, z, rows(x), t, noise)
            return average(terms.mse + terms.vb), terms

        (loss, terms), slopes = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(model.head, rows(z))
        return slopes, {
            "patchified": x,
            "unpatchified": jnp.transpose(from_tokens(x, config.grid, config.patch), NCHW),
            "encoder_out": encoded,
            "decoder_out": z,
            "decoder_out_uncond": model(batch, hidden, everyone),
            "decoder_out_all_masked": model(batch | {"codes": jnp.zeros_like(batch["codes"])}, jnp.ones_like(hidden)),
            "diff_x_t": terms.x_t,
            "diff_net_out": terms.out,
            "diff_row_mse": terms.mse,
            "diff_row_vb": terms.vb,
            "diff_row_loss": terms.mse + terms.vb,
            "diff_loss": loss,
            "forward_loss": loss,
            "grad.z": slopes[1],
        }

    slopes, ours = training(model)
    zeros = jax.tree.map(jnp.zeros_like, model)
    ours |= {
        f"grad.{k}": v
        for k, v in restore("mar", config, replace(zeros, head=slopes[0])).items()
        if f"grad.{k}" in outputs
    }

    for name, schedule in {"train": head.process(), "gen": head.process().respaced(head.respacing)}.items():
        tables = {
            "betas": schedule.betas,
            "alphas_cumprod": schedule.alphas_cumprod,
            "posterior_variance": schedule.posterior_variance,
            "posterior_log_variance_clipped": schedule.posterior_log_variance,
            "posterior_mean_coef1": schedule.posterior_x0,
            "posterior_mean_coef2": schedule.posterior_x_t,
        }
        ours |= {f"{name}_{k}": v for k, v in tables.items()}
    ours["timestep_map"] = head.process().respaced(head.respacing).timestep_map
    ours["timestep_map_100"] = head.process().respaced("100").timestep_map

    steps = meta["num_iter"]
    lens = lambda total, steps: np.maximum(remaining(total, steps), 1)
    ours["mask_lens"] = lens(length, steps)
    for name in outputs:
        if name.startswith("mask_lens_L"):
            total, count = (int(part[1:].lstrip("t")) for part in name.split("_")[2:])
            ours[name] = lens(total, count)

    first, several = jnp.asarray(inputs["sample_noise_init"])[:, None], jnp.asarray(inputs["sample_noise_steps"])
    hundred = dataclasses.replace(head, respacing="100")
    flat = lambda name: ours[name].reshape(b * length, 1, -1)[: len(first)]
    z, null = flat("decoder_out"), flat("decoder_out_uncond")

    @partial(jax.jit, static_argnums=0)
    def drawn(head, z, null, steps, guidance, temperature):
        options = MaskedSampler(temperature=temperature).arrays()
        return head.sample(model.head, z, null, Noise(first, steps[:, :, None]), guidance, options)[0][:, 0]

    ours["diffloss_sample_cfg1"] = drawn(head, z, None, several, 1.0, meta["temperature"])
    ours["diffloss_sample_cfg"] = drawn(head, z, null, several, meta["cfg"], meta["temperature"])
    late = jnp.asarray(inputs["sample100_noise_steps"])
    ours["diffloss_sample100_cfg1"] = drawn(hundred, z, None, late, 1.0, 1.0)

    orders = jnp.asarray(inputs["orders"])
    draws = Table(jnp.asarray(inputs["dense_noise_init"]), jnp.asarray(inputs["dense_noise_steps"]))
    keys = jax.random.split(jax.random.key(0), b)
    for name in ("cfg1", "cfg_linear", "cfg_constant", "uncond"):
        said = lambda what, default, name=name: oracle.read_note(f"tokens_{name}", rf"{what}=([\w.]+)", default)
        scale = float(said("cfg", "1.0"))
        power = 0.0 if said("schedule", "linear") == "constant" else 1.0
        temperature, condition = float(said("temperature", "1.0")), nobody if said("labels", "") == "None" else batch
        options = MaskedSampler(guidance=scale, guidance_power=power, temperature=temperature, iterations=steps)
        codes = config.sample(
            model, {"label": condition["label"]}, keys, options, guided=scale != 1.0, orders=orders, draws=draws
        )
        ours[f"tokens_{name}"] = jnp.transpose(codes, NCHW)
        known = length - lens(length, steps)
        ours[f"cfg_per_iter_{name}"] = options.guidance_at(known - 1, length)
    now = np.asarray([length, *remaining(length, steps)])
    masks = [hidden_by(orders, jnp.full(b, n)) for n in now]
    ours["predicted_mask_per_iter"] = np.asarray([a & ~c for a, c in itertools.pairwise(masks)])
    return ours


SYSTEMS = {"mar_klvae": klvae, "mar": mar}
