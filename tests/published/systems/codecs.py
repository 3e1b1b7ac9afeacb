"""Codecs with discrete codes and their losses: LlamaGen, taming-transformers, CLIP-GEN, MaskGIT; TAEF2."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from t2i_jax.codecs import losses
from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.convert import convert, read, restore
from t2i_jax.core.family import with_fields
from t2i_jax.interop import vgg
from t2i_jax.nn.adversarial import generator_loss, gradient_penalty, input_gradients, mean_discriminator_loss
from tests.published.parity import InDouble, Oracle


def nhwc(x: Any) -> jax.Array:
    return rearrange(jnp.asarray(x), "b c i j -> b i j c")


def nchw(x: Any) -> jax.Array:
    return rearrange(x, "b i j c -> b c i j")


def trained(
    format: str, config: VQGAN, model: Any, images: jax.Array, dtype: str
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Loss and metrics of a training step, and the gradient under published names, computed in `dtype`."""
    exact = with_fields(config, dtype=dtype)
    double = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), dtype), model)
    batch = {"image": jnp.asarray(np.asarray(images), dtype)}
    at = jax.random.key(0), jnp.int32(0)
    objective = lambda m: exact.generator_loss(m, batch | {"outputs": exact.forward(m, batch, *at)}, *at)[:2]
    (total, metrics), slopes = jax.jit(jax.value_and_grad(objective, has_aux=True))(double)
    return *jax.device_get((total, metrics)), restore(format, config, slopes)


def llamagen_vq(oracle: Oracle) -> dict[str, Any]:
    meta, images, outputs = oracle.config, nhwc(oracle.inputs["image"]), oracle.outputs
    ratio = float(oracle.read_note("train_entropy_loss", r"ratio\(([\d.e-]+)\)", "0.1"))
    hints = {"l2_norm": meta["l2_norm"], "beta": meta["beta"], "entropy": ratio}
    hints |= {"groups": meta["groupnorm_groups"], "eps": meta["groupnorm_eps"], "perceptual": 0.0}
    config, model = convert("llamagen-vq", oracle.tensors, **hints)

    @jax.jit
    def forward(model, ids):
        z = config.latents(model, images)
        vectors = config.embed(model, ids)
        return z, config.encode(model, images), vectors, config.decode(model, ids)

    z, ids, vectors, picture = forward(model, jnp.asarray(outputs["ids"]))
    ours = {"pre_quant": nchw(z), "ids": ids, "quantized": nchw(vectors)}
    ours |= dict.fromkeys(("recon", "forward", "decode_code"), nchw(picture))
    ours["codebook_normalized"] = config.embed(model, jnp.arange(config.vocabulary))
    # The entropy term divides distances by 0.01: fp32 gradients of two programs, both right, are up to 4e-4 apart.
    with jax.enable_x64(True):
        total, metrics, slopes = trained("llamagen-vq", config, model, images, "float64")
    rounded = trained("llamagen-vq", config, model, images, "float32")[2]
    ours |= {"train_vq_loss": metrics["commitment"], "train_commit_loss": meta["beta"] * metrics["commitment"]}
    ours |= {"train_entropy_loss": ratio * metrics["entropy"], "train_total": total}
    return ours | {f"grad.{k}": InDouble(v, rounded[k]) for k, v in slopes.items() if f"grad.{k}" in outputs}


def taming_vqgan(oracle: Oracle) -> dict[str, Any]:
    meta, images = oracle.config, nhwc(oracle.inputs["image"])
    hints = {"beta": meta["beta"], "eps": meta["groupnorm_eps"]}
    config, model = convert("taming-vqgan", oracle.tensors, **hints)
    quantised = {
        name: convert("taming-vqgan", oracle.tensors, legacy=legacy, **hints)[1].autoencoder.quantizer
        for name, legacy in {"codebook_loss": True, "codebook_loss_nonlegacy": False}.items()
    }

    @jax.jit
    def forward(model, quantised, ids):
        h = model.autoencoder.encoder(images)
        z, vectors = config.latents(model, images), config.embed(model, ids)
        ours = {"encoder_out": nchw(h), "pre_quant": nchw(z), "ids": config.encode(model, images)}
        ours |= dict.fromkeys(("codebook_entry", "quantized"), nchw(vectors)) | {
            "recon": nchw(config.decode(model, ids))
        }
        return ours | {name: quantizer(z)[2] for name, quantizer in quantised.items()}

    return forward(model, quantised, jnp.asarray(oracle.outputs["ids"]))


def taming_gumbel(oracle: Oracle) -> dict[str, Any]:
    meta, images = oracle.config, nhwc(oracle.inputs["image"])
    kl = float(oracle.read_note("gumbel_kl", r"kl_weight\(([\d.e-]+)\)", "1e-8"))
    config, model = convert("taming-gumbel", oracle.tensors, eps=meta["groupnorm_eps"], kl=kl)
    noise = -jnp.log(nhwc(oracle.inputs["gumbel_exponential"]))
    chosen = next(name for name in oracle.outputs if name.startswith("gumbel_ids_temp"))

    @jax.jit
    def forward(model, ids):
        h, z, quantizer = model.autoencoder.encoder(images), config.latents(model, images), model.autoencoder.quantizer
        logits = quantizer.logits(z)
        weights = quantizer.choice(logits, noise, float(chosen.removeprefix("gumbel_ids_temp")))
        ours = {"encoder_out": nchw(h), "pre_quant": nchw(z), "code_logits": nchw(logits), "ids": quantizer.codes(z)}
        ours |= {chosen: weights.argmax(-1), "gumbel_zq": nchw(weights @ quantizer.rows())}
        ours["gumbel_kl"] = quantizer.config.kl * quantizer.divergence(logits)
        return ours | {"quantized": nchw(config.embed(model, ids)), "recon": nchw(config.decode(model, ids))}

    return forward(model, jnp.asarray(oracle.outputs["ids"]))


def clip_gen_vqgan(oracle: Oracle) -> dict[str, Any]:
    meta, images = oracle.config, nhwc(oracle.inputs["image"])
    config, model = convert("clipgen-vqgan", oracle.tensors, beta=meta["beta"], eps=meta["groupnorm_eps"])

    @jax.jit
    def forward(model, ids):
        z = config.latents(model, images)
        ours = {"latent": nchw(z), "ids": config.encode(model, images)}
        ours |= {"codebook_loss": model.autoencoder.quantizer(z)[2], "quantized": nchw(config.embed(model, ids))}
        return ours | {"recon": nchw(config.decode(model, ids))}

    return forward(model, jnp.asarray(oracle.outputs["ids"]))


def taming_vqloss(oracle: Oracle) -> dict[str, Any]:
    meta, inputs = oracle.config, oracle.inputs
    _, judge = convert("taming-discriminator", oracle.tensors)
    real, h = nhwc(inputs["inputs"]), nhwc(inputs["last_feature"])
    last = rearrange(jnp.asarray(inputs["last_layer_weight"]), "f c i j -> i j c f")
    steps = sorted(int(name.split("step")[1]) for name in oracle.outputs if name.startswith("gen_loss_step"))

    @jax.jit
    def play(judge, last):
        paint = lambda w: jax.lax.conv_general_dilated(h, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        seen = meta.get("perceptual_weight", 1.0) * jnp.mean(inputs["perceptual_value"])
        faithful = lambda w: losses.reconstruction(real, paint(w), "l1") + seen
        fool = lambda w: generator_loss(judge(paint(w))[0], "hinge").mean()
        weight = meta["disc_weight"] * losses.adaptive_weight(faithful, fool, last)
        ours = {"recon": nchw(paint(last))}
        ours |= {f"disc_logits_real_{k}": nchw(judge(real, k == "train")[0]) for k in ("train", "eval")}
        book = meta.get("codebook_weight", 1.0) * jnp.mean(inputs["codebook_loss"])
        for step in steps:
            on = (step >= meta["disc_start"]) * meta.get("disc_factor", 1.0)
            total = lambda w, on=on: faithful(w) + on * weight * fool(w) + book
            loss, slope = jax.value_and_grad(total)(last)
            ours |= {f"gen_loss_step{step}": loss, f"d_weight_step{step}": weight, f"nll_step{step}": faithful(last)}
            ours[f"grad_last_layer_step{step}"] = rearrange(slope, "i j c f -> f c i j")
            logits = judge(real)[0], judge(paint(last))[0]
            ours[f"disc_loss_step{step}"] = on * mean_discriminator_loss(*logits, meta["disc_loss"])
        return ours

    return play(judge, last)


def lpips_head(oracle: Oracle) -> dict[str, Any]:
    inputs, taps = oracle.inputs, range(len(oracle.config["channels"]))
    heads = vgg.lpips_heads(oracle.tensors, Path(oracle.path), len(taps))
    x, y = ([nhwc(inputs[f"feat{side}_{n}"]) for n in taps] for side in (0, 1))
    scaled = (nhwc(inputs["image"]) - vgg.LPIPS_SHIFT) / vgg.LPIPS_SCALE
    distance = jax.jit(losses.compare)(x, y, heads)
    return {"scaled_image": nchw(scaled), "lpips": np.asarray(distance).reshape(-1, 1, 1, 1)}


def maskgit_vqgan(oracle: Oracle) -> dict[str, Any]:
    meta, inputs, outputs = oracle.config, oracle.inputs, oracle.outputs
    part = lambda name: {k.removeprefix(name): v for k, v in oracle.tensors.items() if k.startswith(name)}
    hints = {"beta": meta["commitment_cost"], "groups": meta["groups"], "eps": meta["norm_eps"], "perceptual": 0.0}
    hints["temperature"] = meta["entropy_temperature"]
    config, model = convert("maskgit-vqgan", part("tokenizer/"), entropy=meta["entropy_loss_ratio"], **hints)
    plain = convert("maskgit-vqgan", part("tokenizer/"), entropy=0.0, **hints)
    images, unit = 2 * jnp.asarray(inputs["image"]) - 1, lambda images: (images + 1) / 2

    @jax.jit
    def forward(model, ids):
        ours = {"latent": config.latents(model, images), "ids": config.encode(model, images)}
        ours |= {"quantized": config.embed(model, ids), "recon": unit(config.decode(model, ids))}
        return ours | {"decode_ids": unit(config.decode(model, ids[:1, ::-1]))}

    ours = forward(model, jnp.asarray(outputs["ids"]))
    total, metrics, slopes = trained("maskgit-vqgan", config, model, images, "float32")
    terms = {"e_latent_loss": config.quantizer.commitment * metrics["commitment"]}
    terms |= {"q_latent_loss": metrics["commitment"], "entropy_loss": config.quantizer.entropy * metrics["entropy"]}
    ours |= terms | {"quantizer_loss": sum(terms.values()), "loss": total}
    without = trained("maskgit-vqgan", *plain, images, "float32")[2]
    with jax.enable_x64(True):
        exact = trained("maskgit-vqgan", config, model, images, "float64")[2]
    ours |= {f"grad.{k}": v for k, v in without.items()}
    ours |= {f"grad_full.{k}": InDouble(v, slopes[k]) for k, v in exact.items()}

    judge_config, judge = convert("maskgit-discriminator", part("discriminator/"))
    reals, fakes = jnp.asarray(inputs["disc_real"]), jnp.asarray(inputs["disc_fake"])
    cost = float(oracle.read_note("r1_penalty", r"([\d.]+) \* mean", "10"))

    @jax.jit
    def play(judge):
        def loss(judge):
            real, fake = judge(reals)[0], judge(fakes)[0]
            slope = input_gradients(lambda x: judge(x)[0][:, 0], reals)[1]
            r1 = cost * gradient_penalty(slope).mean()
            ours = {"disc_real_logit": real, "disc_fake_logit": fake, "r1_penalty": r1}
            ours["gen_loss"] = generator_loss(fake, "vanilla").mean()
            return 2 * mean_discriminator_loss(real, fake, "vanilla") + r1, ours

        (total, ours), slopes = jax.value_and_grad(loss, has_aux=True)(judge)
        return ours | {"disc_loss": total}, slopes

    found, slopes = play(judge)
    named = restore("maskgit-discriminator", judge_config, slopes)
    return ours | found | {f"grad.disc.{k}": v for k, v in named.items()}


def taef2(oracle: Oracle) -> dict[str, Any]:
    images, wide = nhwc(oracle.inputs["image"]), nhwc(oracle.inputs["latents_wide"])
    config, model = convert("taesd", read(oracle.released, "taesd"))

    @jax.jit
    def forward(model, images, latents, wide):
        shown = lambda codes: (config.decode(model, codes) + 1) / 2
        slope = jax.grad(lambda z: jnp.mean(shown(z) ** 2))(latents)
        ours = {"latents": config.encode(model, 2 * images - 1), "recon": shown(latents), "recon_wide": shown(wide)}
        return {k: nchw(v) for k, v in (ours | {"grad.latents": slope}).items()}

    return forward(model, images, nhwc(oracle.outputs["latents"]), wide)


SYSTEMS = {
    "taef2": taef2,
    "maskgit_vqgan": maskgit_vqgan,
    "llamagen_vq": llamagen_vq,
    "taming_vqgan": taming_vqgan,
    "taming_vqgan_gumbel": taming_gumbel,
    "taming_vqloss": taming_vqloss,
    "lpips_head": lpips_head,
    "clip_gen_vqgan": clip_gen_vqgan,
}
