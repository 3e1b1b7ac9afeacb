"""GANs in stages: what their parts compute, keep and refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from t2i_jax.convert import convert, read, restore
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.core.params import abstract
from t2i_jax.core.types import Toward
from t2i_jax.models.staged_gan import ALONE, StagedGAN, color_differences, shrunk
from t2i_jax.networks.condition import ClassEmbedder, SentenceAndWords
from t2i_jax.networks.staged_discriminator import ScaleDiscriminator
from t2i_jax.networks.staged_generator import (
    Augmentation,
    DynamicMemory,
    Joint,
    Redraw,
    StagedGenerator,
    WordAttention,
    attended,
    published_mask,
)
from t2i_jax.nn.adversarial import gaussian_kl
from t2i_jax.nn.layers import Conv
from t2i_jax.nn.spectral import SpectralConv
from t2i_jax.presets import PRESETS
from t2i_jax.sampling.progress import listening
from t2i_jax.training.objectives import under
from t2i_jax.training.state import carried_of
from t2i_jax.training.step import written
from tests.fixtures.families import FAMILIES, STAGES, batch_for, fresh, losses_of
from tests.fixtures.released import tensors_of

MEMORY = FAMILIES["staged-gan-memory"]


def arguments(config, b=3):
    """A condition and keys of b images."""
    condition = {k: v for k, v in batch_for(config, b).items() if k in config.condition_spec()}
    return condition, jax.random.split(jax.random.key(3), b)


def test_every_stage_is_reported_at_the_size_of_the_last():
    seen = []
    condition, keys = arguments(MEMORY)
    with listening(lambda done, total, sample: seen.append((done, total, sample))) as progress:
        images = MEMORY.sample(fresh(MEMORY), condition, keys, progress=progress)
    (first, last) = sorted(seen, key=lambda call: call[0])
    assert first[:2] == (1, 2) and last[:2] == (2, 2)
    np.testing.assert_allclose(last[2], images, atol=1e-6)
    assert first[2].shape == images.shape
    np.testing.assert_array_equal(first[2][:, ::2, ::2], first[2][:, 1::2, 1::2])


def test_an_image_depends_on_its_own_caption_and_key():
    condition, keys = arguments(MEMORY)
    images = MEMORY.sample(fresh(MEMORY), condition, keys)
    turned = MEMORY.sample(fresh(MEMORY), {k: v[::-1] for k, v in condition.items()}, keys[::-1])
    np.testing.assert_allclose(images, turned[::-1], atol=1e-5)
    assert np.abs(images[0] - images[1]).max() > 0.01


def test_the_ends_of_a_way_are_the_images_themselves():
    condition, keys = arguments(MEMORY)
    others = {k: v[::-1] for k, v in condition.items()}, keys[::-1]
    ends = MEMORY.sample(fresh(MEMORY), condition, keys, toward=Toward(*others, jnp.asarray([0.0, 0.5, 1.0])))
    images = MEMORY.sample(fresh(MEMORY), condition, keys)
    # The first is its own, the second lies between equal ends, and the third is the first of the others.
    np.testing.assert_allclose(ends, images[np.asarray([0, 1, 0])], atol=1e-5)


def test_words_that_are_masked_are_not_read_and_a_caption_may_have_none():
    h, words = (jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate([(2, 2, 2, 3), (2, 4, 3)]))
    mask = jnp.asarray([[True, True, False, False], [False] * 4])
    read, attention = attended(h, words, words, mask)
    alone, _ = attended(h[:1], words[:1, :2], words[:1, :2], mask[:1, :2])
    np.testing.assert_allclose(read[:1], alone, atol=1e-6)
    assert not attention[0, ..., 2:].any() and np.isfinite(read).all()
    # As published, position n of image r reads the mask of caption (4 r + n) mod 2.
    rows = published_mask(mask, 4)
    np.testing.assert_array_equal(rows[1], mask[np.asarray([0, 1, 0, 1])])


def test_spectral_normalisation_finds_the_largest_singular_value():
    layer = SpectralConv(Conv(3, 5, jax.random.key(0), kernel=2), jax.random.key(1))
    x, kernel = jnp.ones((1, 4, 4, 3)), layer.conv.w[...]

    for _ in range(100):
        y, layer = layer(x)
    sigma = np.linalg.svd(np.asarray(kernel).reshape(-1, 5), compute_uv=False)[0]
    np.testing.assert_allclose(y - layer.conv.b[...], (layer.conv(x) - layer.conv.b[...]) / sigma, rtol=1e-4)
    # The gradient is that of W / sigma: along W itself nothing changes.
    slope = jax.grad(lambda layer: layer(x)[0].sum())(layer).conv.w[...]
    assert abs(float(jnp.sum(slope * kernel))) < 1e-4 * float(jnp.linalg.norm(slope) * jnp.linalg.norm(kernel))


@pytest.mark.parametrize("name", ["staged-gan", "staged-gan-memory"])
def test_each_objective_keeps_the_state_of_its_own_part(name):
    config, found = FAMILIES[name], {}

    def run(model, batch):
        for objective, output in losses_of(config, model, batch, jax.random.key(0), 3).items():
            found[objective] = set(written(output, carried_of(model)))

    model = abstract(config)
    jax.eval_shape(run, model, batch_for(config))
    paths = {k: o.params[0] for k, o in config.objectives().items()}
    assert found == {k: set(under((path,), carried_of(model))) for k, path in paths.items()}


def test_a_folder_of_generator_and_discriminators_is_read_as_one_and_written_back(tmp_path):
    config = StagedGAN(
        StagedGenerator(16, 2, 4, (DynamicMemory(1),), Augmentation(4)),
        ScaleDiscriminator(2, norm="spectral"),
        SentenceAndWords(6, 3),
        mismatched="shifted",
    )
    model = fresh(config)
    tensors = restore("dmgan", config, model)
    for file, prefix in {"netG_epoch_600": "netG.", "netD0": "netD0.", "netD1": "netD1."}.items():
        mine = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        save_file({f"module.{k}": v for k, v in mine.items()}, tmp_path / f"{file}.safetensors")
    again, weights = convert("dmgan", read(tmp_path, "dmgan"), words=3)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, weights, model)
    save_file(tensors, tmp_path / "whole.safetensors")
    whole = convert("dmgan", read(tmp_path / "whole.safetensors", "dmgan"), words=3)[1]
    jax.tree.map(np.testing.assert_array_equal, whole, model)
    # The generator alone samples, and is not trained.
    alone, generator = convert("dmgan", read(tmp_path / "netG_epoch_600.safetensors", "dmgan"), words=3)
    assert alone.discriminator is None and not list(generator.discriminators)
    assert restore("dmgan", alone, generator).keys() == {k.removeprefix("netG.") for k in tensors if "netG" in k}
    with pytest.raises(ConfigError, match="only samples"):
        alone.objectives()


def test_presets_have_the_sizes_of_released_files():
    for name, file in {"attngan": "attngan_bird", "attngan-coco": "attngan_coco", "dmgan-coco": "dmgan_coco"}.items():
        config, _ = convert(name.split("-")[0], tensors_of(f"{file}_G"))
        assert config.network == PRESETS[name].network


def test_losses_and_images_are_fp32_where_the_rest_is_bf16():
    config = with_fields(MEMORY, dtype="bfloat16")
    batch, model = batch_for(config), abstract(config)
    outputs = jax.eval_shape(lambda m, b: losses_of(config, m, b, jax.random.key(0), 3), model, batch)
    assert all(output.loss.dtype == jnp.float32 for output in outputs.values())
    outputs = jax.eval_shape(lambda m, b: config.forward(m, b, jax.random.key(0), jnp.int32(0)), model, batch)
    assert all(stage.image.dtype == jnp.float32 for stage in outputs.stages)
    assert all(stage.features.dtype == jnp.bfloat16 for stage in outputs.stages)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(outputs.generator))


def test_terms_are_summed_with_their_weights():
    condition, real = jnp.ones((4, 8)), jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    config = StagedGAN(
        StagedGenerator(**STAGES, stages=(Joint(1),)),
        ScaleDiscriminator(4),
        ClassEmbedder(3),
        sentence=8,
        mismatched="rolled",
    )
    judge = fresh(config).discriminators[0]
    means, _ = config.judge(judge, real, real, condition, train=False)
    assert means.keys() == {"real", "wrong", "fake", "real_alone", "fake_alone"}
    np.testing.assert_allclose(means["wrong"], means["fake"], rtol=1e-6)  # as all conditions are equal
    loss, _ = config.weighed(means, 0)
    halves = (means["real"] + means["real_alone"]) / 2
    np.testing.assert_allclose(loss, halves + (means["fake"] + means["fake_alone"] + means["wrong"]) / 3, rtol=1e-6)
    # An example of weight 0 does not count.
    weight = jnp.asarray([1.0, 1.0, 1.0, 0.0])
    some, _ = config.judge(judge, real, real, condition, train=False, weight=weight)
    few, _ = config.judge(judge, real[:3], real[:3], condition[:3], train=False)
    np.testing.assert_allclose(some["real"], few["real"], rtol=1e-5)


@pytest.mark.parametrize(("norm", "dtype"), [("batch", "bfloat16"), ("spectral", "float32")])
def test_a_penalty_is_an_update_of_its_own_whose_gradient_is_of_second_order(norm, dtype):
    config = StagedGAN(
        StagedGenerator(8, 2, 4, (), Augmentation(4)), ScaleDiscriminator(4, norm), SentenceAndWords(6, 3), penalty=2.0
    )
    config = with_fields(config, penalty_every=4, dtype=dtype)
    objectives = config.objectives()
    assert list(objectives) == ["discriminator0", "penalty0", "generator"]
    penalty = objectives["penalty0"]
    assert (penalty.optimizer, penalty.every) == ("discriminator0", 4)
    assert objectives["generator"].after == ("discriminator0", "penalty0")
    model, batch = fresh(config), jax.tree.map(jnp.asarray, batch_for(config))

    @jax.jit
    def slope(model):
        outputs = config.forward(model, batch, jax.random.key(0), jnp.int32(0))
        return jax.value_and_grad(lambda m: penalty.loss(m, batch | {"outputs": outputs}, None, None, True).loss)(model)

    value, slopes = slope(model)
    judge = slopes.discriminators[0]
    first = judge.trunk[0].conv
    kernel = (first.conv if norm == "spectral" else first).w[...]
    assert value > 0 and np.isfinite(kernel).all() and jnp.abs(kernel).max() > 0
    assert not jnp.abs(judge.alone.b[...]).max()  # a bias of the logits has no slope


def test_the_divergence_of_an_augmentation_counts_once():
    config = dataclasses.replace(MEMORY, kl=2.0)
    z, eps = jax.random.normal(jax.random.key(0), (2, 4, 4))
    condition = {k: v for k, v in batch_for(config).items() if k in config.condition_spec()}
    outputs = jax.jit(lambda m: m.generator(m.generator.read(condition, 4), z, eps))(fresh(config))
    code = outputs.stages[0].code
    found = config.regularised(outputs, jnp.ones(4))["kl"]
    np.testing.assert_allclose(found, 2 * gaussian_kl(code.mean, code.log_variance).mean(), rtol=1e-6)


def test_colors_of_an_image_and_of_its_smaller_copy_agree():
    image = jnp.repeat(jnp.repeat(jax.random.normal(jax.random.key(0), (2, 4, 4, 3)), 2, 1), 2, 2)
    assert max(map(float, color_differences(image, shrunk(image, 4)))) < 1e-6
    assert float(color_differences(image, 2 * image)[1]) > 0.1


def test_what_cannot_be_is_refused():
    network, alone = StagedGenerator(16, stages=(WordAttention(1),)), StagedGenerator(16, stages=(Joint(1),))
    refused = {
        "power of two": lambda: StagedGenerator(96),
        "at least 32": lambda: StagedGenerator(16),
        "only be the last": lambda: StagedGenerator(256, stages=(Redraw(), Joint())),
        "reads a condition": lambda: StagedGAN(network, condition=ClassEmbedder(0), terms=(ALONE,)),
        "no words to match": lambda: StagedGAN(alone, condition=ClassEmbedder(0), terms=(ALONE,), matching="run"),
        "leaves out": lambda: StagedGAN(network, ScaleDiscriminator(alone="none")),
        "at least those": lambda: StagedGAN(network, terms=()),
    }
    for message, make in refused.items():
        with pytest.raises(ConfigError, match=message):
            make()
