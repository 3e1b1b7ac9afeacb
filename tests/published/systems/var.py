"""Next-scale prediction: VAR and its codec of several scales."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.convert import convert, restore
from t2i_jax.core.family import with_fields
from t2i_jax.models.var import VAR
from t2i_jax.sampling.options import ScaleSampler
from t2i_jax.sampling.tokens import filter_logits
from tests.published.parity import Oracle
from tests.published.systems.codecs import nchw, nhwc


def codec(oracle: Oracle, tensors: dict[str, np.ndarray]) -> tuple[VQGAN, Any]:
    """Configuration and weights of the codec, what the shapes cannot tell taken from the published configuration."""
    meta = oracle.config
    hints = {
        "scales": tuple(meta["patch_nums"]),
        "quant_resi": meta["quant_resi"],
        "beta": meta.get("beta", 0.25),
        "znorm": meta.get("using_znorm", False),
        "eps": meta.get("groupnorm_eps", 1e-6),
        "pixels": "l2",
        "perceptual": 0.0,
    }
    return convert("var-vqvae", tensors, **hints)


def var_vqvae(oracle: Oracle) -> dict[str, Any]:
    images, outputs = nhwc(oracle.inputs["image"]), oracle.outputs
    config, model = codec(oracle, oracle.tensors)

    @jax.jit
    def forward(model, ids):
        z, quantizer = config.latents(model, images), model.autoencoder.quantizer
        totals = [scale.total for scale in quantizer.walk(z)]
        picture = lambda vectors: nchw(jnp.clip(model.autoencoder.decoder(model.autoencoder.from_code(vectors)), -1, 1))
        return {
            "latent": nchw(z),
            "ids": config.encode(model, images),
            "fhat": jnp.stack([nchw(x) for x in totals]),
            "recon": jnp.stack([picture(x) for x in totals]),
            "var_input": quantizer.inputs(ids),
            "idx_to_img": nchw(jnp.clip(config.decode(model, ids), -1, 1)),
            "vq_loss": quantizer(z)[2],
        }

    def loss(model):
        at = jax.random.key(0), jnp.int32(0)
        batch = {"image": images}
        return config.generator_loss(model, batch | {"outputs": config.forward(model, batch, *at)}, *at).loss

    ours = forward(model, jnp.asarray(outputs["ids"]))
    ours["phi_index"] = np.asarray([config.quantizer.convolution_of(n) for n in range(len(config.scales))], np.int32)
    total, slopes = jax.jit(jax.value_and_grad(loss))(model)
    return ours | {"loss": total} | grads(restore("var-vqvae", config, slopes), outputs)


def var(oracle: Oracle) -> dict[str, Any]:
    meta, outputs, inputs = oracle.config, oracle.outputs, {k: jnp.asarray(v) for k, v in oracle.inputs.items()}
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in oracle.tensors.items() if k.startswith(prefix)}
    decoder, weights = codec(oracle, part("vae."))
    hints = {"share_quant_resi": decoder.quantizer.convolutions, "quant_resi": decoder.quantizer.mix}
    hints |= {"scales": tuple(meta["patch_nums"]), "heads": meta["num_heads"], "eps": meta["norm_eps"]}
    config, model = convert("var", part("var."), **hints)
    model = config.with_codec(model, decoder, weights)
    batch = {"codes": inputs["ids"], "label": inputs["labels"]}
    b = len(inputs["labels"])

    @jax.jit
    def forward(model):
        scores = lambda dropped: model.logits(model(batch, jnp.full(b, dropped)))
        return {
            "var_input": model.quantizer.inputs(inputs["ids"]),
            "logits": scores(False),
            "logits_null": scores(True),
        }

    def loss(config: VAR, train: bool):
        config = with_fields(config, condition_dropout=0.0)
        return lambda model: config.loss(model, batch, jax.random.key(0), train).loss

    total, slopes = jax.jit(jax.value_and_grad(loss(config, True)))(model)
    smoothing = float(oracle.read_note("loss_smoothed", r"smoothing ([\d.]+)", "0.1"))
    smoothed = jax.jit(loss(dataclasses.replace(config, label_smoothing=smoothing), True))(model)
    ours = forward(model) | {"loss": total, "loss_smoothed": smoothed}
    ours |= grads(restore("var", config, slopes), outputs)

    pictures = jax.jit(lambda weights, ids: nchw(jnp.clip(decoder.decode(weights, ids), -1, 1) + 1) / 2)
    for name in (name for name in outputs if re.fullmatch("tokens_[a-z]+", name)):
        said = {k: float(oracle.read_note(name, rf"{k}=([\d.]+)", "0")) for k in ("cfg", "top_k", "top_p")}
        options = ScaleSampler(
            guidance=1 + said["cfg"], top_k=int(said["top_k"]), top_p=said["top_p"] or 1.0, greedy="greedy" in name
        )
        noise = None if "greedy" in name else inputs["sample_gumbel"]
        keys = jax.random.split(jax.random.key(0), b)
        ids = config.sample(model, {"label": inputs["labels"]}, keys, options, guided=True, noise=noise)
        ours[name] = ids
        ours[name.replace("tokens", "image")] = pictures(weights, ids)
    for name in outputs:
        if found := re.fullmatch(r"filtered_probs_k(\d+)_p([\d.]+)", name):
            kept = filter_logits(inputs["filter_logits"], 1.0, int(found[1]), float(found[2]) or 1.0)
            ours[name] = kept / kept.sum(-1, keepdims=True)
    return ours


def grads(slopes: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those gradients that the published program gives, under its own names of convolutions that scales share."""
    found = {f"grad.{name}": slope for name, slope in slopes.items()}
    own = lambda name: re.sub(r"quant_resi\.(?:qresi|(\d+))\.", lambda m: f"quant_resi.qresi_ls.{m[1] or 0}.", name)
    return {name: found[own(name)] for name in outputs if own(name) in found}


SYSTEMS = {"var": var, "var_vqvae": var_vqvae}
