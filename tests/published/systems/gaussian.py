"""Gaussian diffusion: DiT, guided-diffusion, GLIDE, RDM."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from t2i_jax.convert import convert, find, restore, unwrapped
from t2i_jax.core.family import with_fields
from t2i_jax.models.diffusion import join_inputs
from t2i_jax.nn.modulation import sinusoid
from t2i_jax.nn.positions import sincos_2d
from t2i_jax.nn.search import EmbeddingTable, nearest
from t2i_jax.nn.transformer import unstack
from t2i_jax.noise import gaussian
from t2i_jax.noise.processes import Discrete, along
from t2i_jax.noise.schedule import Schedule, rows
from t2i_jax.sampling import guidance, solvers
from t2i_jax.sampling.guidance import Branches
from t2i_jax.text.retrieval import retrieved
from tests.published.parity import Oracle


def ours_layout(x: Any) -> jax.Array:
    return rearrange(jnp.asarray(x), "... c i j -> ... i j c")


def theirs_layout(x: Any) -> jax.Array:
    return rearrange(x, "... i j c -> ... c i j")


def trajectory(schedule: Schedule, step: Any, x: Any, noise: Any) -> jax.Array:
    """x after every step, noisiest first; step(x, t, original t, noise) -> x, with times (b,)."""
    count = len(schedule)

    def body(x, i):
        t = jnp.full(len(x), count - 1 - i)
        network_t = jnp.asarray(schedule.timestep_map)[t]
        x = step(x, t, network_t, noise[i])
        return x, x

    return jax.lax.scan(body, x, jnp.arange(count))[1]


def ddim_step(schedule: Schedule, x0: Any, x: Any, t: Any, noise: Any = 0.0, eta: float = 0.0) -> jax.Array:
    """A step of the sampler's `ddim` on all times of a schedule."""
    falling = lambda table, end: jnp.append(jnp.asarray(table, jnp.float32)[::-1], end)
    steps = len(schedule)
    path = along(jnp.arange(steps + 1), falling(schedule.alpha, 1.0), falling(schedule.sigma, 0.0), steps)
    alpha, sigma = schedule.at(t, x)
    found = solvers.Denoised(x0, (x - alpha * x0) / sigma)
    at = steps - 1 - t[0]
    return solvers.ddim(path, at, x, lambda x, i: found, None, lambda i: noise, jnp.float32(eta))[0]  # pyright: ignore


def ddim_reverse_step(schedule: Schedule, x0: Any, x: Any, t: Any) -> jax.Array:
    """x_{t+1} from x_t = x: `ddim_step` without noise in reverse, from an image to its noise."""
    alpha, sigma = schedule.at(t, x)
    abar = rows(np.append(schedule.alphas_cumprod[1:], 0.0), t, x)
    return x0 * jnp.sqrt(abar) + jnp.sqrt(1 - abar) * (x - alpha * x0) / sigma


def dit(oracle: Oracle) -> dict[str, Any]:
    meta, inputs, outputs = oracle.config, oracle.inputs, oracle.outputs
    null = meta.get("class_dropout_prob", 0.1) > 0
    config, model = convert("dit", oracle.tensors, heads=meta["num_heads"], null=null)
    process = dataclasses.replace(
        config.process, schedule=meta["noise_schedule"], steps=meta.get("diffusion_steps", 1000)
    )
    network = with_fields(config.network, eps=meta.get("layernorm_eps", 1e-6))
    config = dataclasses.replace(config, process=process, network=network)
    x, noise, z = (ours_layout(inputs[k]) for k in ("x", "noise", "z"))
    y, t, t_loss = (jnp.asarray(inputs[k]) for k in ("y", "t", "t_loss"))
    b, schedule = len(x), process.tables
    nobody = jnp.zeros(b, bool)
    variance = "learned_range" if network.learn_variance else config.variance

    def forward(model, x, t, dropped=nobody):
        return model(x, t, model.read({"label": y}, dropped))

    def p(schedule, out, x, t, clip=False):
        prediction, v = config._parts(out)
        return gaussian.p_mean_variance(schedule, prediction, x, t, v=v, variance=variance, clip=clip)

    def guided(model, x, t, scale):
        out, without = forward(model, x, t), forward(model, x, t, ~nobody)
        (prediction, v), (other, _) = config._parts(out), config._parts(without)
        moved = guidance.guide(prediction, other, scale, config.guided_channels)
        low = guidance.guide(other, other, scale)
        low = jnp.where(jnp.arange(moved.shape[-1]) < config.guided_channels, moved, low)
        whole = lambda a, out: a if v is None else jnp.concatenate([a, out[..., a.shape[-1] :]], -1)
        return whole(moved, out), whole(low, without)

    @jax.jit
    def parts(model):
        context = model.read({"label": y}, nobody)
        c = model.time(t) + context.pooled
        patches = model.tokens(x)
        block = unstack(model.blocks)[0]
        out = {"t_emb": model.time(t), "y_emb": context.pooled, "patch_embed": patches - model.positions[...]}
        out["block0_out"] = block(patches, context.tokens, c, context.mask)[0]
        out["model_out"] = theirs_layout(forward(model, x, t))
        if "model_out_null" in outputs:
            out["model_out_null"] = theirs_layout(forward(model, x, t, ~nobody))
        if "forward_with_cfg" in outputs:
            out["forward_with_cfg"] = theirs_layout(guided(model, x, t, meta["cfg_scale"])[0])
        x_t = gaussian.q_sample(schedule, x, t_loss, noise)
        out["q_sample"] = theirs_layout(x_t)
        predicted = forward(model, x, t_loss)
        for name, clip in {"": False, "_clipped": True}.items():
            normal = p(schedule, predicted, x, t_loss, clip)
            out |= {f"p_mean{name}": theirs_layout(normal.mean), f"p_pred_xstart{name}": theirs_layout(normal.x0)}
            if not name:
                out |= {"p_variance": theirs_layout(normal.variance)}
                out |= {"p_log_variance": theirs_layout(normal.log_variance)}
        q = gaussian.posterior(schedule, x, noise, t_loss)
        return out | {"q_posterior_mean": theirs_layout(q.mean), "q_posterior_logvar": theirs_layout(q.log_variance)}

    def objective(model):
        losses = config.losses(model, x, t_loss, noise, {"label": y}, nobody)
        return losses["loss"].mean(), losses

    ours = dict(parts(model))
    slopes, losses = jax.jit(jax.grad(objective, has_aux=True, allow_int=True))(model)
    ours |= {f"loss_{k}": v for k, v in losses.items()}
    ours |= {f"grad.{k}": v for k, v in restore("dit", config, slopes).items() if f"grad.{k}" in outputs}

    grid = (network.size[0] // network.patch, network.size[1] // network.patch)
    few, fewer = (schedule.respaced(meta[k]) for k in ("respacing", "ddim_respacing"))
    ours |= {
        "pos_embed": sincos_2d(grid, network.transformer.width)[None],
        "timestep_map": few.timestep_map,
        "ddim_timestep_map": fewer.timestep_map,
        "respaced_betas": few.betas,
        "respaced_alphas_cumprod": few.alphas_cumprod,
        "betas": schedule.betas,
        "betas_squaredcos_cap_v2": Schedule.named("squaredcos_cap_v2", process.steps).betas,
    }
    step_noise, ddim_noise = ours_layout(inputs["step_noise"]), ours_layout(inputs["ddim_step_noise"])

    @jax.jit
    def sampled(model):
        def ddpm(x, t, network_t, noise):
            return gaussian.ddpm_step(p(few, forward(model, x, network_t), x, t), t, noise)

        def ddpm_guided(x, t, network_t, noise):
            return gaussian.ddpm_step(p(few, guided(model, x, network_t, meta["cfg_scale"])[0], x, t), t, noise)

        def ddim(x, t, network_t, noise, eta=0.0, clip=False):
            x0 = p(fewer, forward(model, x, network_t), x, t, clip).x0
            return ddim_step(fewer, x0, x, t, noise, eta)

        def upwards(x, i):
            t = jnp.full(b, i)
            network_t = jnp.asarray(fewer.timestep_map)[t]
            return ddim_reverse_step(fewer, p(fewer, forward(model, x, network_t), x, t).x0, x, t), None

        out = {"ddpm_traj": trajectory(few, ddpm, z, step_noise)}
        if "ddpm_cfg_final" in outputs:
            out["ddpm_cfg_final"] = trajectory(few, ddpm_guided, z, step_noise)[-1]
        out["ddim_traj"] = trajectory(fewer, ddim, z, ddim_noise)
        eta = next((k for k in outputs if k.startswith("ddim_eta")), None)
        if eta:
            share = float(eta.removeprefix("ddim_eta").removesuffix("_final"))
            out[eta] = trajectory(fewer, lambda *a: ddim(*a, eta=share, clip=True), z, ddim_noise)[-1]
        out["ddim_reverse_final"] = jax.lax.scan(upwards, z, jnp.arange(len(fewer)))[0]
        return {k: theirs_layout(v) for k, v in out.items()}

    return {k: np.asarray(v) for k, v in (ours | sampled(model)).items()}


def part(oracle: Oracle, name: str) -> dict[str, np.ndarray]:
    """The tensors of one of several models in a folder."""
    return {k.removeprefix(f"{name}."): v for k, v in oracle.tensors.items() if k.startswith(f"{name}.")}


def heads_of(meta: dict[str, Any]) -> dict[str, Any]:
    """How attention splits its channels, by the flags of the published program."""
    fixed = meta.get("num_head_channels") or -1
    return {
        "head_dim": 0 if fixed == -1 else fixed,
        "heads": meta.get("num_heads") or 1,
        "up_heads": max(meta.get("num_heads_upsample") or 0, 0),
        "qkv_first": bool(meta.get("use_new_attention_order", False)),
        "groups": meta.get("groupnorm_groups", 32),
        "eps": meta.get("groupnorm_eps", 1e-5),
    }


def guided_diffusion(oracle: Oracle) -> dict[str, Any]:
    meta, inputs, outputs = oracle.config, oracle.inputs, oracle.outputs
    if meta.get("use_kl"):
        raise ValueError("use_kl: a loss that is the variational bound alone is not offered")
    steps = meta.get("diffusion_steps", 1000)
    process = Discrete(meta["noise_schedule"], steps, rescale_times=meta.get("rescale_timesteps", False))
    kind = {"size": meta["image_size"], "blocks": meta["num_res_blocks"]}
    config, model = convert("adm", part(oracle, "unet"), process=process, **kind, **heads_of(meta))
    predicts = "x0" if meta.get("predict_xstart", False) else "eps"
    small = meta.get("sigma_small", False)
    config = dataclasses.replace(config, predicts=predicts, variance="fixed_small" if small else "fixed_large")
    schedule = process.tables
    x, noise, x0, z = (ours_layout(inputs[k]) for k in ("x", "noise", "x0", "z"))
    t, t_loss = (jnp.asarray(inputs[k]) for k in ("t", "t_loss"))
    y = jnp.asarray(inputs.get("y", np.zeros(len(x), np.int32)))
    nobody = jnp.zeros(len(x), bool)
    clip = meta.get("clip_denoised", True)
    variance = "learned_range" if config.network.learn_variance else config.variance
    classify, labels = None, y
    if meta.get("classifier"):
        of = meta["classifier"]
        hints = heads_of({k: v for k, v in meta.items() if k.startswith("groupnorm")} | of)
        grid = {"size": of["image_size"], "blocks": of["num_res_blocks"]}
        _, classify = convert("adm_classifier", part(oracle, "classifier"), **grid, **hints)

    def forward(model, x, t):
        return model(x, process.network_time(t), model.read({"label": y}, nobody))

    def p(schedule, x, t, network_t):
        prediction, v = config._parts(forward(model, x, network_t))
        return gaussian.p_mean_variance(
            schedule, prediction, x, t, v=v, predicts=predicts, variance=variance, clip=clip
        )

    def gradient(x, network_t):
        log_p = lambda x: guidance.of_class(classify(x, process.network_time(network_t)), labels)
        return guidance.classifier_gradient(log_p, x, meta["classifier_scale"])

    def shifted(normal, x, t, network_t):
        return normal._replace(mean=normal.mean + normal.variance * gradient(x, network_t))

    def scored(schedule, x, t, network_t):
        alpha, sigma = schedule.at(t, x)
        eps = (x - alpha * p(schedule, x, t, network_t).x0) / sigma - sigma * gradient(x, network_t)
        return (x - sigma * eps) / alpha

    @jax.jit
    def parts():
        out = {"timestep_embedding": sinusoid(t, config.network.width)}
        out["unet_out"] = theirs_layout(forward(model, x, t))
        normal = p(schedule, x, t, t)
        out |= {"p_mean": normal.mean, "p_log_variance": normal.log_variance, "p_pred_xstart": normal.x0}
        if classify is not None:
            out["classifier_logits"] = classify(x, process.network_time(t))
            out["cond_grad"] = gradient(x, t)
            out["condition_mean"] = shifted(normal, x, t, t).mean
            out["condition_score_xstart"] = scored(schedule, x, t, t)
            out["condition_score_mean"] = gaussian.posterior(schedule, out["condition_score_xstart"], x, t).mean
        return {k: theirs_layout(v) if v.ndim == 4 and k != "unet_out" else v for k, v in out.items()}

    def objective(model, weight):
        losses = dataclasses.replace(config, vlb_weight=weight).losses(model, x0, t_loss, noise, {"label": y}, nobody)
        return losses["loss"].mean(), losses

    ours = dict(parts())
    slopes, losses = jax.jit(jax.grad(objective, has_aux=True))(model, 1.0)
    ours |= {f"loss_{k}": v for k, v in losses.items()}
    if "loss_rescaled_loss" in outputs:
        losses = jax.jit(objective)(model, steps / 1000)[1]
        ours |= {f"loss_rescaled_{k}": v for k, v in losses.items()}
    slopes = {f"grad.unet.{k}": v for k, v in restore("adm", config, slopes).items()}
    ours |= {k: v for k, v in slopes.items() if k in outputs}

    few, fewer = (schedule.respaced(str(meta.get(k) or steps)) for k in ("respacing", "ddim"))
    ours |= {"timestep_map": few.timestep_map}
    if meta.get("ddim"):
        ours["ddim_timestep_map"] = fewer.timestep_map
    step_noise = ours_layout(inputs["step_noise"])

    @jax.jit
    def sampled():
        plain = lambda x, t, network_t, noise: gaussian.ddpm_step(p(few, x, t, network_t), t, noise)
        out = {"ddpm_traj": trajectory(few, plain, z, step_noise)}
        if classify is not None:
            guided_by_classifier = lambda x, t, network_t, noise: gaussian.ddpm_step(
                shifted(p(few, x, t, network_t), x, t, network_t), t, noise
            )
            ddim = lambda x, t, network_t, noise: ddim_step(fewer, scored(fewer, x, t, network_t), x, t)
            out["ddpm_guided_traj"] = trajectory(few, guided_by_classifier, z, step_noise)
            if meta.get("ddim"):
                out["ddim_guided_traj"] = trajectory(fewer, ddim, z, jnp.zeros((len(fewer), 1)))
        return {k: theirs_layout(v) for k, v in out.items()}

    ours |= sampled()
    if "superres_out" in outputs:
        of = {k: v for k, v in meta["superres"].items() if k in meta} if isinstance(meta["superres"], dict) else {}
        tensors, hints = part(oracle, "superres"), heads_of(meta | of)
        enlarge, larger = convert(
            "adm", tensors, size=meta["image_size"], blocks=(meta | of)["num_res_blocks"], process=process, **hints
        )
        extra = {"low_res": ours_layout(inputs["low_res"]), "label": y}

        @jax.jit
        def enlarged():
            read = join_inputs(x, extra, enlarge.network.extra_inputs)
            return larger(read, process.network_time(t), larger.read(extra, nobody))

        ours["superres_out"] = theirs_layout(enlarged())
    return {k: np.asarray(v) for k, v in ours.items()}


def glide(oracle: Oracle) -> dict[str, Any]:
    meta, inputs, outputs = oracle.config, oracle.inputs, oracle.outputs
    process = Discrete(meta["noise_schedule"], meta.get("diffusion_steps", 1000))
    hints = {"size": meta["image_size"], "blocks": meta["num_res_blocks"], "process": process}
    heads = heads_of(meta) | {"qkv_first": False}
    config, model = convert("glide", part(oracle, "unet"), text_heads=meta["xf_heads"], **hints, **heads)
    x, z = ours_layout(inputs["x"]), ours_layout(inputs["z"])
    t, nobody = jnp.asarray(inputs["t"]), jnp.zeros(len(x), bool)
    caption = lambda name: {
        "text": jnp.asarray(inputs[f"{name}tokens"]),
        "text_mask": jnp.asarray(inputs[f"{name}mask"]).astype(bool),
    }
    pictures = {
        ours: ours_layout(inputs[theirs])
        for ours, theirs in {"low_res": "low_res", "inpaint": "inpaint_image", "inpaint_mask": "inpaint_mask"}.items()
        if theirs in inputs
    }
    few = process.tables.respaced(str(meta["respacing"]))
    scale, of = meta["guidance"], meta.get("clip")
    judge = encode = None
    if of:
        tensors = {k: v for k, v in oracle.tensors.items() if k.startswith("clip_")}
        judge, encode = convert("glide_clip", tensors, head_dim=of["head_state"], scale=float(of["logit_scale"]))
        lengths = jnp.asarray(inputs["clip_lens"])[:, None]
        tokens = jnp.asarray(inputs["clip_tokens"])
        captions = {"clip_text": tokens, "clip_mask": jnp.arange(tokens.shape[1]) < lengths}

    def gradient(x, t):
        return guidance.classifier_gradient(lambda x: judge.log_p(encode, x, t, captions), x, of["grad_scale"])

    @jax.jit
    def run():
        context = model.read(caption(""), nobody)
        without = model.read(caption("uncond_"), nobody)
        read = lambda x: join_inputs(x, pictures, config.network.extra_inputs)
        forward = lambda x, t, context: model(read(x), t, context)
        out = {
            "xf_out": rearrange(context.tokens, "b s d -> b d s"),
            "xf_proj": context.pooled,
            "unet_out": theirs_layout(forward(x, t, context)),
            "unet_out_uncond": theirs_layout(forward(x, t, without)),
        }

        def p(x, t, network_t, guided=False):
            prediction, v = config._parts(forward(x, network_t, context))
            if guided:
                other, _ = config._parts(forward(x, network_t, without))
                prediction = guidance.guide(prediction, other, scale, config.guided_channels)
            variance = "fixed_large" if v is None else "learned_range"
            return gaussian.p_mean_variance(few, prediction, x, t, v=v, variance=variance, clip=True)

        def guided_by_classifier(normal, x, network_t):
            return normal._replace(mean=normal.mean + normal.variance * gradient(x, network_t))

        plain = lambda x, t, network_t, noise: gaussian.ddpm_step(p(x, t, network_t), t, noise)
        guided = lambda x, t, network_t, noise: gaussian.ddpm_step(p(x, t, network_t, True), t, noise)
        steered = lambda x, t, network_t, noise: gaussian.ddpm_step(
            guided_by_classifier(p(x, t, network_t), x, network_t), t, noise
        )
        ways = {"cond_ddpm_final": plain, "cfg_ddpm_final": guided}
        if encode is not None:
            ways["clip_guided_ddpm_final"] = steered
            out["clip_text_emb"] = encode.texts(captions["clip_text"], captions["clip_mask"])
            out["clip_image_emb"] = encode.images(x, t)
            out["clip_cond_grad"] = theirs_layout(gradient(x, t))
        noise = ours_layout(inputs["step_noise"])
        return out | {k: theirs_layout(trajectory(few, step, z, noise)[-1]) for k, step in ways.items() if k in outputs}

    return {k: np.asarray(v) for k, v in run().items()} | {"timestep_map": few.timestep_map}


def rdm(oracle: Oracle) -> dict[str, Any]:
    meta, inputs, outputs = oracle.config, oracle.inputs, oracle.outputs
    context, normalised = outputs["context"], meta["mode"] == "rdm768"
    hints = heads_of(meta) | {"size": meta["image_size"], "length": context.shape[1]}
    tensors = unwrapped(oracle.tensors, find("rdm"))
    config, model = convert("rdm", tensors, **hints)
    ends = meta["linear_start"], meta["linear_end"]
    config = dataclasses.replace(config, process=dataclasses.replace(config.process, ends=ends))
    database, query = EmbeddingTable(jnp.asarray(inputs["database"])), jnp.asarray(inputs["query"])
    ours = {"nn_ids": nearest(database, query, outputs["nn_ids"].shape[1])}
    ours["context"] = retrieved(database, query, context.shape[1] - 1, normalise=normalised)
    x, eps, z = (ours_layout(inputs[k]) for k in ("x", "eps", "z"))
    t, nobody = jnp.asarray(inputs["t"]), jnp.zeros(len(x), bool)
    batch, noise = {"features": ours["context"]}, ours_layout(inputs["step_noise"])
    path = config.process.timesteps(meta["steps"], spacing="leading")
    ours |= {"betas": config.process.tables.betas, "alphas_cumprod": config.process.tables.alphas_cumprod}
    ours["ddim_timesteps"] = np.asarray(path.t)[: int(path.steps)][::-1]

    @jax.jit
    def objective(model):
        return config.losses(model, x, t, eps, batch, nobody)["loss"].mean()

    @jax.jit
    def drawn(model, eta):
        both = Branches(True)
        everything = both.rows(batch)
        read = model.read(everything, both.dropped(len(x)))

        def denoise(x, i):
            out, null = both(lambda x, t: model(x, t, read), x, jnp.full(len(x), path.t[i]))
            guided = guidance.guide(out, null, meta["scale"])
            return config.denoised(guided, None, x, path.alpha[i], path.sigma[i], config.sampling)

        return theirs_layout(solvers.solve(solvers.ddim, denoise, z, path, lambda i: noise[i], eta))

    forward = jax.jit(lambda model, dropped: theirs_layout(model(x, t, model.read(batch, dropped))))
    ours |= {"model_out": forward(model, nobody), "model_out_null": forward(model, ~nobody)}
    ours["loss"], slopes = jax.value_and_grad(objective)(model)
    ours |= {f"grad.model.diffusion_model.{k}": v for k, v in restore("rdm", config, slopes).items()}
    return ours | {f"ddim_eta{eta}_final": drawn(model, float(eta)) for eta in (0, 1)}


SYSTEMS = {"dit": dit, "guided_diffusion": guided_diffusion, "glide": glide, "rdm": rdm}
