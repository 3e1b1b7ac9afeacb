"""Codecs under published names compute what the published programs computed."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from safetensors.numpy import load_file

from t2i_jax.codecs import losses
from t2i_jax.codecs.autoencoder import AutoencoderConfig
from t2i_jax.codecs.discriminator import Discriminator, DiscriminatorConfig
from t2i_jax.codecs.quantize import QuantizerConfig
from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.interop import vqgan
from t2i_jax.interop.names import to_ours, to_theirs

HERE, SHARED = Path(__file__).parent / "oracles", Path(__file__).parents[3] / "shared" / "oracles"


def oracle(name):
    """Configuration, weights, inputs and outputs of one published system; skips where they are not at hand."""
    folder = next((f / name for f in (HERE, SHARED) if (f / name).exists()), None)
    if folder is None:
        pytest.skip(f"no folder {name}")
    config = json.loads((folder / "meta.json").read_text())["config"]
    return (
        config,
        load_file(folder / "weights.safetensors"),
        np.load(folder / "inputs.npz"),
        np.load(folder / "outputs.npz"),
    )


def nhwc(x):
    return rearrange(jnp.asarray(x), "b c i j -> b i j c")


def assert_close(ours, theirs, rtol=1e-4):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs) <= rtol * np.linalg.norm(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max())


def converted(codec, weights, style):
    abstract = jax.eval_shape(codec.init, jax.random.key(0))
    table = vqgan.table(abstract, style)
    model = to_ours(abstract, weights, table, ignore=vqgan.IGNORED)
    back = to_theirs(model, table)
    assert all((back[k] == weights[k]).all() for k in back)
    return jax.tree.map(jnp.asarray, model)


def llamagen_config(c, **changes):
    return VQGAN(
        AutoencoderConfig(
            c["ch"], tuple(c["ch_mult"]), c["num_res_blocks"], latent=c["z_channels"], eps=c["groupnorm_eps"]
        ),
        QuantizerConfig(c["codebook_size"], c["codebook_embed_dim"], commitment=c["beta"], entropy=0.1),
        perceptual=0.0,
        adversarial=0.0,
        **changes,
    )


def taming_config(c, legacy=True):
    d = c["ddconfig"]
    sides = [d["resolution"] >> n for n in range(len(d["ch_mult"]))]
    levels = tuple(n for n, side in enumerate(sides) if side in d["attn_resolutions"])
    autoencoder = AutoencoderConfig(
        d["ch"],
        tuple(d["ch_mult"]),
        d["num_res_blocks"],
        latent=d["z_channels"],
        attention=levels,
        eps=c["groupnorm_eps"],
    )
    weights = {"codebook": c["beta"], "commitment": 1.0} if legacy else {"codebook": 1.0, "commitment": c["beta"]}
    return VQGAN(autoencoder, QuantizerConfig(c["n_embed"], c["embed_dim"], False, **weights), adversarial=0.0)


def test_llamagen_codec():
    c, weights, inputs, outputs = oracle("llamagen_vq")
    codec = llamagen_config(c)
    model = converted(codec, weights, "llamagen")
    images = nhwc(inputs["image"])
    z, codes = jax.jit(codec.latents)(model, images), jax.jit(codec.encode)(model, images)
    assert_close(z, nhwc(outputs["pre_quant"]))
    assert ((codes == outputs["ids"]) | (outputs["argmin_margin"] < 1e-3)).all()
    assert_close(codec.embed(model, outputs["ids"]), nhwc(outputs["quantized"]))
    assert_close(jax.jit(codec.decode)(model, outputs["ids"]), nhwc(outputs["recon"]))
    assert_close(codec.embed(model, jnp.arange(codec.vocabulary)), outputs["codebook_normalized"])


def test_llamagen_loss_and_gradients():
    c, weights, inputs, outputs = oracle("llamagen_vq")
    codec = llamagen_config(c)
    model = converted(codec, weights, "llamagen")
    batch = {"image": nhwc(inputs["image"])}
    objective = lambda m: codec.generator_loss(m, batch, jax.random.key(0), 0)
    (loss, (metrics, _)), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(model)
    assert_close(0.25 * metrics["commitment"], outputs["train_commit_loss"])
    assert_close(metrics["commitment"], outputs["train_vq_loss"])
    assert_close(0.1 * metrics["entropy"], outputs["train_entropy_loss"])
    assert_close(loss, outputs["train_total"])
    grads = to_theirs(grads, vqgan.table(model, "llamagen"))
    for name in ("encoder.conv_in.weight", "quantize.embedding.weight", "decoder.conv_out.bias"):
        # Both lie up to 8e-5 from the gradient in float64: the entropy term divides distances by 0.01.
        assert_close(grads[name], outputs[f"grad.{name}"], rtol=2e-4)


@pytest.mark.parametrize("legacy", [True, False])
def test_taming_codec(legacy):
    c, weights, inputs, outputs = oracle("taming_vqgan")
    codec = taming_config(c, legacy)
    model = converted(codec, weights, "taming")
    images = nhwc(inputs["image"])
    z = jax.jit(codec.latents)(model, images)
    assert_close(z, nhwc(outputs["pre_quant"]))
    assert ((codec.encode(model, images) == outputs["ids"]) | (outputs["argmin_margin"] < 1e-3)).all()
    loss = model.autoencoder.quantizer(z)[2]
    assert_close(loss, outputs["codebook_loss" if legacy else "codebook_loss_nonlegacy"])
    assert_close(jax.jit(codec.decode)(model, outputs["ids"]), nhwc(outputs["recon"]))


@pytest.mark.parametrize("name", ["llamagen_VQ-16", "llamagen_VQ-8", "taming_vqgan_f16_1024", "taming_vqgan_f16_16384"])
def test_released_sizes_have_a_place_for_every_name(name):
    path = SHARED / "_release_shapes" / f"{name}.json"
    if not path.exists():
        pytest.skip(f"no file {path.name}")
    release = json.loads(path.read_text())
    tensors = {k: jax.ShapeDtypeStruct(tuple(shape), np.float32) for k, shape in release["tensors"].items()}
    multipliers = (1, 2, 2, 4) if name.endswith("VQ-8") else (1, 1, 2, 2, 4)
    quantizer = QuantizerConfig(int(name.split("_")[-1]), 256, False) if "taming" in name else QuantizerConfig()
    codec = VQGAN(AutoencoderConfig(multipliers=multipliers), quantizer, adversarial=0.0)
    abstract = jax.eval_shape(codec.init, jax.random.key(0))
    style = name.split("_")[0]
    filled = jax.eval_shape(lambda t: to_ours(abstract, t, vqgan.table(abstract, style), ignore=vqgan.IGNORED), tensors)
    assert sum(x.size for x in jax.tree.leaves(filled)) == release["numel_params"]


def test_taming_losses():
    c, weights, inputs, outputs = oracle("taming_vqloss")
    shape = DiscriminatorConfig(c["disc_ndf"], c["disc_num_layers"])
    abstract = jax.eval_shape(lambda k: Discriminator(shape, k), jax.random.key(0))
    judge = to_ours(abstract, weights, vqgan.discriminator(abstract), ignore=vqgan.IGNORED)
    judge = jax.tree.map(jnp.asarray, judge)
    real = nhwc(inputs["inputs"])
    assert_close(judge(real, train=True)[0], nhwc(outputs["disc_logits_real_train"]))
    assert_close(judge(real, train=False)[0], nhwc(outputs["disc_logits_real_eval"]))

    h, last = nhwc(inputs["last_feature"]), rearrange(jnp.asarray(inputs["last_layer_weight"]), "f c i j -> i j c f")
    conv = lambda w: jax.lax.conv_general_dilated(h, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    faithful = lambda w: losses.reconstruction(real, conv(w), "l1") + jnp.mean(inputs["perceptual_value"])
    fool = lambda w: losses.hinge_generator(judge(conv(w))[0])
    assert_close(conv(last), nhwc(outputs["recon"]))
    for step in (50, 200):
        weight = c["disc_weight"] * losses.adaptive_weight(faithful, fool, last)
        assert_close(weight, outputs[f"d_weight_step{step}"])
        total = lambda w, on=step >= c["disc_start"], weight=weight: (
            faithful(w) + on * weight * fool(w) + inputs["codebook_loss"]
        )
        loss, grad = jax.value_and_grad(total)(last)
        assert_close(faithful(last), outputs[f"nll_step{step}"])
        assert_close(loss, outputs[f"gen_loss_step{step}"])
        assert_close(rearrange(grad, "i j c f -> f c i j"), outputs[f"grad_last_layer_step{step}"])
        hinge = losses.hinge_discriminator(judge(real)[0], judge(conv(last))[0])
        assert_close((step >= c["disc_start"]) * hinge, outputs[f"disc_loss_step{step}"])


def test_lpips_head():
    c, weights, inputs, outputs = oracle("lpips_head")
    taps = range(len(c["channels"]))
    heads = tuple(jnp.asarray(weights[f"lin{n}.model.1.weight"].reshape(-1)) for n in taps)
    x, y = ([nhwc(inputs[f"feat{side}_{n}"]) for n in taps] for side in (0, 1))
    assert_close(losses.compare(x, y, heads), outputs["lpips"].reshape(-1))
