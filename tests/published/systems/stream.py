"""Single-stream models and their discrete codecs: DALL-E's and DALLE-pytorch's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.convert import convert, restore
from t2i_jax.models.stream import Stream
from t2i_jax.sampling.options import ARSampler
from t2i_jax.sampling.tokens import filter_logits
from tests.published.parity import Oracle


def nchw(x: Any) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)


def nhwc(x: np.ndarray) -> jax.Array:
    return jnp.asarray(np.moveaxis(x, 1, -1))


def openai_dvae(oracle: Oracle) -> dict[str, Any]:
    config, model = convert("openai_dvae", oracle.tensors)

    @jax.jit
    def run(images):
        logits = config.logits(model, images)
        codes = config.encode(model, images)
        painted = config.decode_head(model, config.embed(model, codes))
        return config.to_logit_space(images), logits, codes, painted, config.decode(model, codes)

    mapped, logits, codes, painted, seen = run(nhwc(oracle.inputs["image01"]) * 2 - 1)
    return {
        "mapped": nchw(mapped),
        "logits": nchw(logits),
        "ids": codes,
        "decoder_out": nchw(painted),
        "recon": nchw(seen) / 2 + 0.5,
    }


def cross_entropy(logits: jax.Array, ids: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], -1).mean()


def logits_of(config: Stream, model: Any, batch: dict[str, jax.Array], dropped: jax.Array) -> tuple[jax.Array, ...]:
    """Logits of the text tokens and of the codes; dropped: bool (b,), rows without their text."""
    w, x = model(config.condition(batch, dropped), batch["codes"])
    return model.text_logits(w), model.image_logits(x)


def joint(text: jax.Array, image: jax.Array) -> jax.Array:
    """Both as logits (b, t, rows + v) over one vocabulary, text first: the lowest number for what a place cannot be."""
    lowest = jnp.finfo(jnp.float32).min
    wide = lambda x, *sides: jnp.pad(x, [(0, 0), (0, 0), sides], constant_values=lowest)
    return jnp.concatenate([wide(text, 0, image.shape[-1]), wide(image, text.shape[-1], 0)], 1)


def mindalle(oracle: Oracle) -> dict[str, Any]:
    meta, inputs, outputs = oracle.config, oracle.inputs, oracle.outputs
    activation = "quick_gelu" if meta["gelu_use_approx"] else "gelu"
    config, model = convert("mindalle", oracle.tensors, heads=meta["n_heads"], activation=activation)
    text, codes = jnp.asarray(inputs["texts"]), jnp.asarray(inputs["images"])
    batch = {"text": text, "codes": codes.reshape(-1, *config.grid)}

    def objective(model):
        logits_txt, logits_img = logits_of(config, model, batch, jnp.zeros(len(text), bool))
        loss = cross_entropy(logits_img, codes)
        return loss, (logits_txt, logits_img, cross_entropy(logits_txt, text[:, 1:]))

    run = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (loss_img, (logits_txt, logits_img, loss_txt)), slopes = run(model)
    ours = {"logits_img": logits_img, "logits_txt": logits_txt, "loss_img": loss_img, "loss_txt": loss_txt}
    slopes = restore("mindalle", config, slopes)
    ours |= {name: slopes[name.removeprefix("grad_img.")] for name in outputs if name.startswith("grad_img.")}

    keys = jax.random.split(jax.random.key(0), len(text))
    greedy = config.sample(model, {"text": text}, keys, ARSampler(guidance=1.0, greedy=True), segments=1)
    ours["greedy_tokens"] = np.asarray(greedy).reshape(len(text), -1)

    for name in outputs:
        if name.startswith("filtered_probs"):
            k, p = (part[1:] for part in name.split("_")[2:])
            # They stop at a sum of p, where we go on until it is above: the next smaller number says the same.
            p = 1.0 if p == "None" else np.nextafter(np.float32(p), np.float32(0))
            weights = filter_logits(jnp.asarray(inputs["filter_logits"]), 1.0, 0 if k == "None" else int(k), p)
            ours[name] = weights / weights.sum(-1, keepdims=True)
    return ours


KNOWN = {"dim", "depth", "heads", "dim_head", "num_text_tokens", "text_seq_len", "total_text_vocab", "num_image_tokens"}
KNOWN |= {"image_seq_len", "loss_img_weight", "share_input_output_emb", "sandwich_norm", "shift_tokens", "attn_types"}
KNOWN |= {"rotary_emb", "cond_scale", "vae", "ff_dropout", "attn_dropout", "optimize_for_inference", "stable"}
KNOWN |= {"shared_attn_ids", "shared_ff_ids"}  # the file holds a shared layer once for each place


def dalle_pytorch(oracle: Oracle) -> dict[str, Any]:
    meta, inputs, outputs = oracle.config, oracle.inputs, oracle.outputs
    for flag in meta.keys() - KNOWN:
        if meta.get(flag):
            raise ValueError(f"{flag}={meta[flag]!r} of DALLE-pytorch is not known here")
    side = round(meta["image_seq_len"] ** 0.5)
    kinds = meta["attn_types"] or ("full",)
    config, model = convert(
        "dalle_pytorch",
        oracle.tensors,
        heads=meta["heads"],
        grid=(side, side),
        text_length=meta["text_seq_len"],
        attn_types=(kinds,) if isinstance(kinds, str) else kinds,
        codes=meta["num_image_tokens"],
        stable=bool(meta.get("stable")),
        image_weight=float(meta["loss_img_weight"]),
        condition_dropout=0.0,
    )
    ours = dalle_pytorch_vae(oracle)
    text, codes = jnp.asarray(inputs["text"]), jnp.asarray(inputs["image_ids"])
    batch = {"text": text, "codes": codes.reshape(-1, *config.grid)}
    b = len(text)

    @jax.jit
    def run(model):
        loss, slopes = jax.value_and_grad(lambda m: config.loss(m, batch, jax.random.key(0)).loss)(model)
        logits = (joint(*logits_of(config, model, batch, jnp.full(b, dropped))) for dropped in (False, True))
        return slopes, loss, *logits

    slopes, ours["loss"], ours["logits"], ours["logits_null"] = run(model)
    slopes = restore("dalle_pytorch", config, slopes)
    ours |= {name: slopes[name.removeprefix("grad.")] for name in outputs if name.startswith("grad.")}

    keys = jax.random.split(jax.random.key(0), b)
    for name, scale in (("nocfg", 1.0), ("cfg", meta["cond_scale"])):
        options = ARSampler(guidance=scale, greedy=True)
        greedy = config.sample(model, {"text": text}, keys, options, guided=True, segments=1)
        ours[f"greedy_tokens_{name}"] = np.asarray(greedy).reshape(b, -1)
    return ours


def dalle_pytorch_vae(oracle: Oracle) -> dict[str, Any]:
    inputs, meta = oracle.inputs, oracle.config["vae"]
    settings = {"straight_through": True} if meta.get("straight_through") else {}
    if meta.get("smooth_l1_loss"):
        settings["pixels"] = "smooth_l1"
    config, model = convert("dalle_pytorch_vae", oracle.tensors, **settings)

    @jax.jit
    def run(images, gumbel):
        logits, codes = config.logits(model, images), config.encode(model, images)
        soft = config.relaxed(model, logits, gumbel, meta.get("temperature", 0.9))
        distance, divergence = config.terms(images, soft, logits)
        # The published loss sums the divergence over the images of a batch, where ours is a mean.
        loss = distance + meta.get("kl_div_loss_weight", 0.1) * divergence * len(images)
        return logits, codes, config.decode(model, codes), soft, loss

    gumbel = -jnp.log(nhwc(inputs["gumbel_exponential"]))
    logits, codes, decoded, soft, loss = run(nhwc(inputs["image01"]) * 2 - 1, gumbel)
    return {
        "vae_logits": nchw(logits),
        "vae_ids": codes.reshape(len(codes), -1),
        "vae_decode": nchw(decoded),
        "vae_recon_soft": nchw(soft),
        "vae_loss": loss,
    }


SYSTEMS = {"openai_dvae": openai_dvae, "mindalle": mindalle, "dalle_pytorch": dalle_pytorch}
