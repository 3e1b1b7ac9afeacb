"""What ours is compared with in PyTorch gives the same numbers, and refuses what it is not."""

import dataclasses
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.pytorch.autoregressive import Decoder, Training
from benchmarks.pytorch.codec import Codec
from benchmarks.pytorch.denoising import Denoiser
from t2i_jax import bench
from t2i_jax.codecs.autoencoder import AutoencoderConfig
from t2i_jax.codecs.kl import KL
from t2i_jax.codecs.quantize import QuantizerConfig
from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.core.config import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.models.ar import AR
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.networks.condition import CaptionEncoder, ClassEmbedder
from t2i_jax.networks.dit import DiT
from t2i_jax.noise.processes import Flow
from t2i_jax.sampling.options import ARSampler, DiffusionSampler
from tests.fixtures.autoregressive import TINY, model_for

pytest.importorskip("torch")


def shaken(model, by=0.2):
    """Weights that are nowhere zero or one."""
    return jax.tree.map(lambda x: x + by * jax.random.normal(jax.random.key(x.size), x.shape), model)


@pytest.mark.parametrize("guided", [True, False])
def test_the_loop_in_pytorch_draws_the_same(guided):
    model, labels = model_for(TINY), jnp.array([1, 4, 2])
    options, keys = ARSampler(guidance=2.0, greedy=True), jax.random.split(jax.random.key(1), 3)
    ours = TINY.sample(model, {"label": labels}, keys, options, segments=1, guided=guided)
    eager = Decoder(TINY, model)
    np.testing.assert_array_equal(np.asarray(ours).reshape(3, -1), eager.sample(labels, options, guided))


def test_greedy_tokens_are_those_of_the_loop_in_pytorch_over_a_whole_picture():
    model = with_fields(
        AR(), vocabulary=512, grid=(16, 16), width=64, depth=3, heads=4, mlp=176, condition=ClassEmbedder(10)
    )
    network, labels = model.init(jax.random.key(3)), jnp.array([1, 7])
    # Fresh output matrices are zero: every token would be the first.
    network = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), network)
    eager, options, keys = (
        Decoder(model, network),
        ARSampler(guidance=3.0, greedy=True),
        jax.random.split(jax.random.key(1), 2),
    )
    ours = np.asarray(model.sample(network, {"label": labels}, keys, options)).reshape(2, 256)
    threads = eager.torch.get_num_threads()
    eager.torch.set_num_threads(1)  # more of them only wait for each other in products as small as these
    np.testing.assert_array_equal(ours, eager.sample(labels, options))
    eager.torch.set_num_threads(threads)
    assert len(np.unique(ours)) > 50


def test_the_loop_in_pytorch_filters_as_ours_does():
    eager = Decoder(TINY, model_for(TINY))
    logits = eager.torch.tensor([[0.0, 3.0, 1.0, 2.0, -5.0]]).repeat(300, 1)
    # Of the three most likely codes only, and of those only the first half of the probability.
    assert set(eager._draw(logits, ARSampler(top_k=3)).tolist()) == {1, 2, 3}
    assert set(eager._draw(logits, ARSampler(top_k=3, top_p=0.5)).tolist()) == {1}


def test_the_loop_in_pytorch_is_of_class_models_only():
    with pytest.raises(ValueError, match=r"not transformer\.qk_norm"):
        Decoder(with_fields(TINY, qk_norm=True), None)
    with pytest.raises(ValueError, match="not condition"):
        Decoder(with_fields(TINY, condition=CaptionEncoder(11, length=4)), None)


def test_a_train_step_has_the_same_loss_and_gradients():
    config = with_fields(TINY, dropout=0.0, token_dropout=0.0, condition_dropout=0.0)
    model, label = model_for(config), jnp.array([1, 4, 2])
    codes = jax.random.randint(jax.random.key(2), (3, *config.grid), 0, config.vocabulary)
    loss = lambda m: config.loss(m, {"label": label, "codes": codes}, jax.random.key(0)).loss
    ours, grads = jax.value_and_grad(loss)(model)
    theirs = Training(Decoder(config, model), learning_rate=0.0, ema=0.9)
    assert theirs.step(label, codes) == pytest.approx(float(ours), rel=1e-5)
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
    shrunk = np.asarray(grads.output[...]).T / max(float(norm), 1.0)
    np.testing.assert_allclose(theirs.decoder.output.grad, shrunk, rtol=1e-3, atol=1e-6)
    for average, weight in zip(theirs.average, theirs.weights, strict=True):  # nothing moved
        np.testing.assert_allclose(average, weight.detach(), rtol=1e-6)
    learning = Training(Decoder(config, model), learning_rate=1e-2, ema=0.9)
    before = learning.weights[-1].detach().clone()
    assert [learning.step(label, codes) for _ in range(2)][-1] < float(ours)
    moved, lag = (float((w.detach() - before).norm()) for w in (learning.weights[-1], learning.average[-1]))
    assert 0.02 * moved < lag < 0.3 * moved


@pytest.mark.parametrize("patch", [1, 2])
def test_a_vqgan_gives_the_same_codes_and_pictures(patch):
    shape = AutoencoderConfig(channels=8, multipliers=(1, 2), blocks=1, latent=6, groups=4, patch=patch)
    config = VQGAN(shape, QuantizerConfig(11, 3))
    model = shaken(config.init(jax.random.key(0)))
    images = jax.random.uniform(jax.random.key(1), (2, 16, 24, 3), minval=-1, maxval=1)
    theirs, codes = Codec(config, model), config.encode(model, images)
    np.testing.assert_array_equal(theirs.encode(images), codes)
    assert len(np.unique(codes)) > 1
    np.testing.assert_allclose(
        theirs.decode(codes).permute(0, 2, 3, 1), config.decode(model, codes), rtol=1e-4, atol=1e-4
    )


DENOISER = Diffusion(
    with_fields(
        DiT(),
        size=(6, 4),
        channels=3,
        patch=2,
        width=16,
        depth=2,
        heads=2,
        condition=ClassEmbedder(5),
        learn_variance=False,
    ),
    Flow(),
    predicts="velocity",
    solver="euler",
)


def test_a_diffusion_transformer_paints_the_same():
    model, labels, keys = (
        shaken(DENOISER.init(jax.random.key(0))),
        jnp.array([3, 1]),
        jax.random.split(jax.random.key(1), 2),
    )
    options = DiffusionSampler(steps=3, guidance=2.0)
    ours = DENOISER.sample(model, {"label": labels}, keys, options)
    start = lambda key: jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, 0), 0), DENOISER.shape)
    embedded, null = (model.read({"label": labels}, jnp.full(2, none)).pooled for none in (False, True))
    theirs = Denoiser(DENOISER, model).sample(embedded, null, options, jax.vmap(start)(keys))
    np.testing.assert_allclose(theirs.permute(0, 2, 3, 1), ours, rtol=1e-4, atol=1e-4)


def test_without_guidance_one_branch_is_painted():
    model, labels = shaken(DENOISER.init(jax.random.key(0))), jnp.array([3, 1])
    embedded = model.read({"label": labels}, jnp.zeros(2, bool)).pooled
    noise, denoiser = jax.random.normal(jax.random.key(1), (2, *DENOISER.shape)), Denoiser(DENOISER, model)
    one, both = (
        denoiser.sample(embedded, u, DiffusionSampler(steps=2, guidance=1.0), noise)
        for u in (None, jnp.zeros_like(embedded))
    )
    np.testing.assert_allclose(one, both, rtol=1e-4, atol=1e-4)


MODELS = {
    "train": "with_fields(AR(16, (2, 2)), width=16, depth=1, heads=2, condition=ClassEmbedder(5), dropout=0.0)",
    "codec": "VQGAN(AutoencoderConfig(8, (1, 2), 1, latent=6, groups=4), QuantizerConfig(11, 3))",
    "sample": "Diffusion(with_fields(DiT((4, 4), 3, 2), width=16, depth=1, heads=2, condition=ClassEmbedder(5), "
    "learn_variance=False), Flow(), predicts='velocity', solver='euler', "
    "sampling=DiffusionSampler(steps=2, guidance=2.0))",
}
CONFIG = """
from t2i_jax.core.family import with_fields
from t2i_jax.codecs.autoencoder import AutoencoderConfig
from t2i_jax.codecs.quantize import QuantizerConfig
from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import Folder
from t2i_jax.models.ar import AR
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.networks.condition import ClassEmbedder
from t2i_jax.networks.dit import DiT
from t2i_jax.noise.processes import Flow
from t2i_jax.training.experiment import Experiment
experiment = Experiment({}, Data(Folder(""), image_size=8, batch_size=8))
"""


@pytest.mark.parametrize("command", MODELS)
def test_commands_compare_and_refuse_other_kinds(command, tmp_path, monkeypatch):
    fast = lambda dtype="float32", size=0: dict.fromkeys(("flops", "read", "copy"), lambda: 1e9)
    for name in ("drawing", "train", "codec"):
        monkeypatch.setattr(importlib.import_module(f"t2i_jax.bench.{name}"), "limits", fast)
    (tmp_path / "config.py").write_text(CONFIG.format(MODELS[command]))
    extra = {"train": ["--encoded"], "codec": ["--batch", "2"], "sample": ["--batch", "2"]}[command]
    main = lambda *words: bench.main([command, str(tmp_path / "config.py"), *extra, "--repeats", "1", *words])
    main("--eager", "--out", str(tmp_path / "out.json"))
    assert all(r["eager"] > 0 for r in json.loads((tmp_path / "out.json").read_text())["results"])
    odd = {"train": "compute.dtype=bfloat16", "codec": "dtype=bfloat16", "sample": "solver=dpm++"}[command]
    with pytest.raises(ConfigError, match=f"--eager: .*not {odd.split('=')[0]}"):
        main("--eager", f"--model.{odd}")


def test_other_codecs_and_denoisers_are_refused():
    with pytest.raises(ValueError, match="of an AR, not of a KL"):
        Decoder(KL(), None)
    with pytest.raises(ValueError, match="of a Diffusion, not of a KL"):
        Denoiser(KL(), None)
    with pytest.raises(ValueError, match="of a VQGAN"):
        Codec(KL(), None)
    with pytest.raises(ValueError, match="not solver"):
        Denoiser(dataclasses.replace(DENOISER, solver="dpm++"), None)
    with pytest.raises(ValueError, match=r"not network\.transformer\.qk_norm"):
        Denoiser(dataclasses.replace(DENOISER, network=with_fields(DENOISER.network, qk_norm=True)), None)
