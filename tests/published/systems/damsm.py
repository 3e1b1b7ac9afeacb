"""DAMSM: words, sentences, regions and codes, the four losses, and how they train both encoders."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from t2i_jax.convert import convert, restore
from t2i_jax.models.damsm import Encoded
from t2i_jax.nn.matching import word_region_scores
from tests.published.parity import Oracle


def damsm(oracle: Oracle) -> dict[str, Any]:
    meta, inputs, outputs = oracle.config, oracle.inputs, oracle.outputs
    tensors = {name.partition(".")[2]: x for name, x in oracle.tensors.items()}
    gammas = {name.lower(): meta[name] for name in ("GAMMA1", "GAMMA2", "GAMMA3")}
    config, model = convert("damsm", tensors, length=inputs["captions"].shape[1], **gammas)
    side = inputs["mixed_6e"].shape[2:]
    lengths, longest = inputs["cap_lens"], int(inputs["cap_lens"].max())
    text = jnp.asarray(inputs["captions"])
    mask = jnp.arange(text.shape[1])[None] < lengths[:, None]
    maps = rearrange(jnp.asarray(inputs["mixed_6e"]), "b c i j -> b i j c"), jnp.asarray(inputs["pooled"])
    batch = {"text": text, "text_mask": mask, "label": jnp.asarray(inputs["class_ids"])}
    at = jax.random.key(0), jnp.int32(0), False

    def objective(model, batch) -> tuple[jax.Array, tuple[dict, Encoded]]:
        encoded = Encoded(*model.text(text, mask), *model.image(*maps))
        loss, metrics, _ = config.text_loss(model, batch | {"outputs": encoded}, *at)
        return loss, (dict(metrics), encoded)

    @jax.jit
    def run(model):
        found, slopes = jax.value_and_grad(objective, has_aux=True)(model, batch)
        encoded = found[1][1]
        attention = word_region_scores(encoded.words, mask, encoded.regions, config.gamma1, config.gamma2)[1]
        unit = lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True)
        plain = objective(model, {k: v for k, v in batch.items() if k != "label"})[0]
        return found, slopes, attention, unit(encoded.code) @ unit(encoded.sentence).T, plain

    (loss, (metrics, encoded)), slopes, attention, cosines, plain = run(model)
    grads = restore("damsm", config, slopes)
    parts = {k: "text_encoder" if k.startswith(("encoder.", "rnn.")) else "image_encoder" for k in grads}
    square = lambda x: rearrange(x, "b (i j) d -> b d i j", i=side[0])
    ours = {
        "words_emb": rearrange(encoded.words, "b s k -> b k s")[..., :longest],
        "sent_emb": encoded.sentence,
        "region_features": square(encoded.regions),
        "image_code": encoded.code,
        "w_loss0": metrics["words/image_to_text"],
        "w_loss1": metrics["words/text_to_image"],
        "s_loss0": metrics["sentence/image_to_text"],
        "s_loss1": metrics["sentence/text_to_image"],
        "attention": rearrange(attention, "b s (i j) -> b s i j", i=side[0])[:, :longest],
        "loss": loss,
        "loss_no_class_ids": plain,
        "r_precision_scores": cosines,
        "grad_norm_text_encoder": np.sqrt(sum((g**2).sum() for k, g in grads.items() if parts[k] == "text_encoder")),
    }
    for name in outputs:  # some with every nth input channel alone
        stem, _, step = name.removeprefix("grad.").partition("_s")
        if name.startswith("grad.") and step.isdecimal():
            ours[name] = grads[stem.partition(".")[2]][:, :: int(step)]
    return ours | {f"grad.{parts[k]}.{k}": g for k, g in grads.items()}


SYSTEMS = {"damsm": damsm}
