"""Masked and any-order models: MAR and its KL autoencoder, MaskGIT."""

import dataclasses
import itertools
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.convert import convert, restore
from t2i_jax.heads import SoftmaxHead
from t2i_jax.nn.layers import replace
from t2i_jax.nn.tokens import from_tokens, to_tokens
from t2i_jax.nn.transformer import scan_stack
from t2i_jax.sampling.options import SHAPES, MaskedSampler, share_hidden
from t2i_jax.sampling.orders import hidden_by, remaining
from t2i_jax.sampling.progress import listening
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
    lens = lambda total, steps: np.maximum(remaining(total, MaskedSampler(iterations=steps)), 1)
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
    now = np.asarray([length, *remaining(length, MaskedSampler(iterations=steps))])
    masks = [hidden_by(orders, jnp.full(b, n)) for n in now]
    ours["predicted_mask_per_iter"] = np.asarray([a & ~c for a, c in itertools.pairwise(masks)])
    return ours


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GumbelNoise:
    """Published Gumbel noise of some positions at a step, in the place of random draws."""

    step: jax.Array
    positions: jax.Array
    codes: jax.Array
    """(b, m, v)"""
    choice: jax.Array
    """(b, m)"""

    def uniform(self, i: Any) -> jax.Array:
        """The uniform numbers whose Gumbel noise chooses positions."""
        return jnp.exp(-jnp.exp(-self.choice))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GumbelTable:
    """Published Gumbel noise of every step and position."""

    codes: jax.Array
    """(steps, b, L, v)"""
    choice: jax.Array
    """(steps, b, L)"""

    def at(self, step: Any, positions: jax.Array) -> GumbelNoise:
        take = jax.vmap(lambda rows, p: rows[p])
        return GumbelNoise(step, positions, take(self.codes[step], positions), take(self.choice[step], positions))


ASKED: dict[int, np.ndarray] = {}
"""Positions (b, m) that a `GumbelHead` was asked for, by step."""


@dataclasses.dataclass(frozen=True)
class GumbelHead(SoftmaxHead):
    """A `SoftmaxHead` that takes the code with the largest logit plus published noise."""

    def sample(self, module: Any, z: Any, null: Any, draws: Any, guidance: Any, options: Any) -> tuple[Any, Any]:
        jax.debug.callback(lambda step, at: ASKED.update({int(step): np.asarray(at)}), draws.step, draws.positions)
        logits = self.logits(module, z)
        x = jnp.argmax(logits + draws.codes, -1).astype(jnp.int32)
        return x, jnp.take_along_axis(jax.nn.log_softmax(logits), x[..., None], -1)[..., 0]


def maskgit(oracle: Oracle) -> dict[str, Any]:
    meta, inputs, outputs = oracle.config, oracle.inputs, oracle.outputs
    grid = (inputs["ids"].shape[1] // meta["latent_size"], meta["latent_size"])
    config, model = convert(
        "maskgit",
        oracle.tensors,
        codes=meta["codebook_size"],
        grid=grid,
        eps=meta["layernorm_eps"],
        activation={"tanh": "gelu_tanh"}.get(meta["gelu"], meta["gelu"]),
        label_smoothing=meta["label_smoothing"],
        dropout=0.0,
    )
    b, length, steps = len(inputs["labels"]), config.length, meta["num_iter"]
    x, hidden = jnp.asarray(inputs["ids"]), jnp.asarray(inputs["mask"])
    batch = {"label": jnp.asarray(inputs["labels"]), "codes": from_tokens(x, config.grid, 1)}

    @jax.jit
    def training(model):
        read = model.read(batch, jnp.zeros(b, bool))
        embedded = model.masked_sequence(*read, x, hidden, length)
        first = scan_stack(jax.tree.map(lambda a: a[:1], model.blocks), embedded)

        def objective(model):
            each = config.head.loss(model.output(), model(batch, hidden), x, jax.random.key(0), train=True)
            return config.mean_loss(each, hidden, batch)

        loss, slopes = jax.value_and_grad(objective)(model)
        logits = model.output()(model.finish(model.states(embedded, *read)))
        return slopes, {"embedded": embedded, "layer0": first, "logits": logits, "loss": loss}

    slopes, ours = training(model)
    ours |= {f"grad.{k}": v for k, v in restore("maskgit", config, slopes).items() if f"grad.{k}" in outputs}

    kinds = {"uniform": "linear", "pow": "power"}
    for name in outputs:
        if found := re.fullmatch(r"schedule_([a-z]+)([\d.]*)", name):
            total = float(oracle.read_note(name, r"total_unknown (\d+)", "256"))
            shape = kinds.get(found[1], found[1])
            ours[name] = share_hidden(shape, jnp.asarray(inputs["ratios"]), 1, total, float(found[2] or 2))
        if found := re.fullmatch(r"mask_lens_L(\d+)_T(\d+)", name):
            total, count = jnp.asarray([int(found[1])]), int(found[2])
            options = MaskedSampler(iterations=count, original=True).arrays()
            ours[name] = np.asarray([jnp.floor(total * options.share(i, total))[0] for i in jnp.arange(count)], int)

    drawing = dataclasses.replace(config, head=GumbelHead(config.head.vocabulary))
    draws = GumbelTable(jnp.asarray(inputs["sample_gumbel"])[:, :, 1:], jnp.asarray(inputs["choice_gumbel"])[:, :, 1:])
    with_class = lambda x: np.concatenate([inputs["labels"][..., None] + config.head.vocabulary, x], -1)
    keep = np.zeros((b, length), bool)

    def drawn(keep: np.ndarray, **changed: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Ids at the end, after every step, what the network reads at each, and how many are hidden there."""
        options = MaskedSampler(
            guidance=1.0,
            iterations=steps,
            original=True,
            **{"choice_temperature": meta["choice_temperature"]} | changed,
        )
        seen: dict[int, np.ndarray] = {}
        ASKED.clear()
        with listening(lambda done, total, codes: seen.update({done: codes.reshape(b, -1)})) as progress:
            end = drawing.sample(
                model,
                {"label": batch["label"]},
                jax.random.split(jax.random.key(0), b),
                options,
                guided=False,
                known=batch["codes"],
                keep=jnp.asarray(keep).reshape(b, *config.grid),
                draws=draws,
                progress=progress,
            )
            jax.effects_barrier()
        schedule, now = options.arrays(), jnp.asarray((~keep).sum(1))
        total, counts, read = now, [], []
        for n, step in enumerate(range(options.start, steps)):
            before = seen[n] if n else inputs["ids"]
            gone = np.arange(ASKED[step].shape[1]) < np.asarray(now)[:, None]
            masked = np.zeros((b, length), bool)
            for row in range(b):
                masked[row, ASKED[step][row][gone[row]]] = True
            read.append(with_class(np.where(masked, meta["mask_token_id"], before)))
            counts.append(masked.sum(1))
            now = schedule.remaining(jnp.asarray(step), total, now)
        traj = np.stack([with_class(seen[n + 1]) for n in range(len(counts))], 1)
        return with_class(np.asarray(end).reshape(b, -1)), traj, np.stack(read), np.stack(counts)

    ours["tokens"], ours["tokens_traj"], ours["input_traj"], counts = drawn(keep)
    ours["masked_counts"] = counts[:, 0]
    power = float(oracle.read_note("tokens_greedy_choice", r"pow([\d.]+)", "2"))
    greedy = drawn(keep, shape=SHAPES.index("power"), power=power, choice_temperature=0.0)
    ours["tokens_greedy_choice"], ours[f"masked_counts_pow{power:g}"] = greedy[0], greedy[3][:, 0]
    start = int(oracle.read_note("tokens_edit", r"start_iter (\d+)", "2"))
    ours["tokens_edit"], _, _, ours["masked_counts_edit"] = drawn(~inputs["mask"], start=start)
    return ours


SYSTEMS = {"maskgit": maskgit, "mar_klvae": klvae, "mar": mar}
