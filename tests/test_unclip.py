"""unCLIP: a prior draws embeddings of images, a decoder reads them; a folder of Karlo becomes a model that samples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from t2i_jax.cli import main
from t2i_jax.convert import convert, restore
from t2i_jax.core.config import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.interop import clip as published
from t2i_jax.interop.names import to_theirs
from t2i_jax.models.unclip import UnCLIP
from t2i_jax.networks.clip import CLIPTowers
from t2i_jax.networks.condition import ClassEmbedder, Conditioning, Context, CrossAttnFeatures
from t2i_jax.networks.prior import EmbeddingPrior
from t2i_jax.networks.unclip import CaptionAndTokens, ImageAndCaption, NoisedImageAndTokens
from t2i_jax.networks.unet import UNet
from t2i_jax.nn.layers import replace
from t2i_jax.nn.modulation import sinusoid
from t2i_jax.noise.processes import Discrete
from t2i_jax.sampling.options import UnCLIPSampler
from t2i_jax.storage.artifacts import load_artifact
from t2i_jax.text.clip import ClipCaption
from tests.fixtures.clip_files import letters
from tests.fixtures.families import DECODER, FAMILIES, PRIOR, UNET, batch_for, fresh
from tests.fixtures.published_models import random
from tests.fixtures.torchfiles import save_torch

CONFIG = FAMILIES["unclip"]
OPTIONS = UnCLIPSampler(2, prior_steps=3)


def test_a_prior_draws_the_candidate_nearest_to_the_caption():
    model, batch = fresh(CONFIG), batch_for(CONFIG)
    condition, keys = (
        {k: batch[k] for k in CONFIG.condition_spec() if k in batch},
        jax.random.split(jax.random.key(0), 4),
    )
    draw = lambda config, model: config.embeddings(model, condition, keys, OPTIONS)
    several = dataclasses.replace(CONFIG, candidates=3)
    best, shifted = draw(several, model), draw(several, replace(model, mean=jnp.full(5, 2.0), std=jnp.zeros(5)))
    np.testing.assert_array_equal(shifted, np.full((4, 5), 2.0))

    own = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, 6), 3))(keys).reshape(-1)
    repeated = {k: np.repeat(v, 3, 0) for k, v in condition.items()}
    options = dataclasses.replace(PRIOR.sampling, steps=3, guidance=OPTIONS.prior_guidance)
    z = np.asarray(CONFIG.prior.sample(model.prior, repeated, own, options)).reshape(4, 3, 5)
    nearest = np.einsum("bnk,bk->bn", z, condition["features"][:, 0]).argmax(1)
    np.testing.assert_allclose(best, z[np.arange(4), nearest], atol=1e-5)


def test_a_decoder_may_read_captions_of_its_own_and_noised_embeddings():
    """As Stable unCLIP: shapes of losses and samples, and what reaches each part."""
    what = NoisedImageAndTokens(CrossAttnFeatures(6, 3), 5, 32, Discrete("cosine", 20))
    network = with_fields(UNet(), **UNET, context=6, pool="summary", transformers=1, condition=what)
    config = UnCLIP(PRIOR, dataclasses.replace(DECODER, network=network))
    spec = config.condition_spec()
    assert spec["features"].shape == (7 + 3, 6) and spec["text_mask"].shape == (6,) and config.noise_levels == 20
    batch = {k: jnp.asarray(v) for k, v in batch_for(config).items()}
    assert batch.keys() == {"features", "text_mask", "image", "image_features"}
    prior, decoder = config._split(batch)
    np.testing.assert_array_equal(prior["features"], batch["features"][:, :7, :5])
    np.testing.assert_array_equal(decoder["features"], batch["features"][:, 7:])
    key, model = jax.random.key(0), jax.eval_shape(config.init, jax.random.key(0))
    for train in (False, True):
        assert jax.eval_shape(lambda m, b, train=train: config.loss(m, b, key, train).loss, model, batch).shape == ()
    condition = {k: v for k, v in batch.items() if k in spec}
    sample = lambda m, c: config.sample(m, c, jax.random.split(key, 4), UnCLIPSampler(2, image_noise=19))
    assert jax.eval_shape(sample, model, condition).shape == (4, 4, 4, 3)
    with pytest.raises(ValueError, match="image_noise 20: this decoder has levels 0 to 19"):
        config.check(UnCLIPSampler(image_noise=20))
    with pytest.raises(ValueError, match="image_noise 1: this decoder has levels 0 to 0"):
        CONFIG.check(UnCLIPSampler(image_noise=1))


def test_an_embedding_is_noised_in_units_of_its_spread():
    condition = NoisedImageAndTokens(CrossAttnFeatures(6, 3), 5, 8, Discrete("cosine", 20))
    model = condition.init(jax.random.key(0), 8)
    model = replace(model, mean=jnp.full(5, 3.0), std=jnp.full(5, 2.0))
    z, eps, none = jnp.ones((2, 5)), jnp.full((2, 5), 0.5), jnp.zeros(2, bool)
    level = jnp.asarray([4, 19])
    alpha, sigma = condition.process.alpha_sigma(level, z)
    noised = 2 * (alpha * (z - 3) / 2 + sigma * eps) + 3
    given = {"image_features": z, "image_noise": eps, "image_noise_level": level}
    expected = model.out(jax.nn.silu(model.into(jnp.concatenate([noised, sinusoid(level, 5)], 1))))
    np.testing.assert_allclose(model.whole(given, none), expected, atol=1e-6)
    nothing = model.out(jax.nn.silu(model.into(jnp.zeros((2, 10)))))
    np.testing.assert_allclose(model.whole(given, ~none), nothing, atol=1e-6)


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="image_features"):
        UnCLIP(PRIOR, PRIOR)
    with pytest.raises(ConfigError, match=r"prior: draws .*; the decoder needs codes of 5 numbers"):
        UnCLIP(DECODER, DECODER)
    what = ImageAndCaption(CrossAttnFeatures(5, 7), summary=33)
    with pytest.raises(ConfigError, match="33 numbers; the embedding of the time has 32"):
        with_fields(UNet(), **UNET, context=16, pool="summary", condition=what)
    with pytest.raises(ConfigError, match="no summary vector"):
        with_fields(UNet(), **UNET, pool="summary", condition=ClassEmbedder(3))
    with pytest.raises(ValueError, match="null_tokens 7"):
        CaptionAndTokens(CrossAttnFeatures(5, 7), null_tokens=7)


def test_a_caption_that_is_empty_or_dropped_has_the_tokens_of_an_empty_one():
    condition = CaptionAndTokens(CrossAttnFeatures(5, 7), null_tokens=2)
    batch = {"features": jnp.ones((3, 7, 5)), "text_mask": jnp.arange(6) < jnp.asarray([[4], [4], [0]])}
    tokens, mask = condition.init(jax.random.key(0), 8)(batch, jnp.asarray([False, True, False]))
    assert mask.sum(1).tolist() == [5, 3, 3] and mask[:, -1].all()
    np.testing.assert_array_equal(tokens[1], tokens[2])
    assert not np.array_equal(tokens[0], tokens[1])


def test_a_decoder_learns_from_embeddings_without_captions():
    """In training, as often as said: variations of an image are drawn so. The prior reads every caption."""
    model, batch = jax.tree.map(lambda x: 0.1 * x, random(CONFIG)), batch_for(CONFIG)
    rest = {"features": batch["features"] + 1.0, "text_mask": batch["text_mask"][:, ::-1]}

    def losses(share, batch, train=True):
        objectives = dataclasses.replace(CONFIG, caption_dropout=share).objectives().values()
        run = lambda batch: [o.loss(model, batch, jax.random.key(3), jnp.int32(0), train).loss for o in objectives]
        return [float(loss) for loss in jax.jit(run)(batch)]

    (prior, always), (other, same) = losses(1.0, batch), losses(1.0, batch | rest)
    assert always == same and prior != other
    empty = {"text_mask": np.zeros_like(batch["text_mask"])}
    assert always == losses(0.0, batch | empty)[1] != losses(0.0, batch)[1]
    assert losses(1.0, batch, train=False) == losses(0.0, batch, train=False)
    assert CONFIG.caption_dropout == 0.5


def test_each_row_is_denoised_by_the_expert_of_its_time():
    network = dataclasses.replace(FAMILIES["upsampler-experts"].network, last_times=10)
    model = jax.jit(network.init)(jax.random.key(0))
    first, last = (
        replace(net, out=replace(net.out, b=jnp.full(3, n))) for net, n in ((model.first, 1.0), (model.last, 2.0))
    )
    model = replace(model, first=first, last=last)
    x = jax.random.normal(jax.random.key(1), (3, 4, 4, 6))
    run = jax.jit(lambda m, t: m(x, t, m.read({}, jnp.zeros(3, bool)))[:, 0, 0, 0])
    for t, expected in (([0, 9, 5], [2, 2, 2]), ([10, 999, 500], [1, 1, 1]), ([10, 9, 0], [1, 2, 2])):
        np.testing.assert_array_equal(run(model, jnp.asarray(t)), expected)


def test_a_prior_sees_no_padding():
    network = PRIOR.network
    model = jax.tree.map(lambda x: 0.3 * x, random(network))
    x, t = jax.random.normal(jax.random.key(0), (2, 1, 1, 5)), jnp.asarray([3, 500])
    tokens, mask = (
        jax.random.normal(jax.random.key(1), (2, 7, 16)),
        jnp.asarray([[1] * 7, [1] * 3 + [0] * 3 + [1]], bool),
    )
    other = jnp.where(mask[..., None], tokens, 9.0)
    run = jax.jit(lambda tokens: model(x, t, Context(jnp.zeros((2, 16)), tokens, mask)))
    np.testing.assert_allclose(run(tokens), run(other), atol=1e-5)
    assert not np.allclose(run(tokens)[0], run(-tokens)[0], atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The files of a small Karlo in a folder, and the configuration that they are of."""
    path = tmp_path_factory.mktemp("karlo")
    tower = dataclasses.replace(CLIPTowers().text, width=64, depth=1, heads=1)
    sizes = CLIPTowers(tower, tower, dim=64, vocabulary=516, length=8, size=8, patch=4)
    save_file(to_theirs(random(sizes), published.openai_table(64, 64)), path / "ViT-L-14.pt")
    letters(path)
    encoded = CrossAttnFeatures(64, 9, trained_null=False)
    caption = Conditioning(CaptionAndTokens(encoded))
    prior = dataclasses.replace(
        PRIOR, network=EmbeddingPrior(64, dataclasses.replace(PRIOR.network.transformer, width=64, heads=1), caption)
    )
    network = UNet(
        (8, 8),
        width=32,
        multipliers=(1,),
        blocks=1,
        attention=(),
        head_dim=16,
        context=16,
        pool="summary",
        conditioning=Conditioning(ImageAndCaption(encoded, summary=128)),
    )
    decoder = dataclasses.replace(DECODER, network=network)
    for name, config in {"prior": prior, "decoder": decoder}.items():
        small = jax.tree.map(lambda x: 0.1 * x, random(config))
        save_torch({"state_dict": restore(f"karlo_{name}", config, small)}, path / f"{name}-ckpt-step=1.ckpt")
    rng = np.random.default_rng(0)
    save_torch([rng.normal(size=64).astype(np.float32), np.ones(64, np.float32)], path / "ViT-L-14_stats.th")
    return path


def test_a_folder_of_karlo_becomes_a_model_that_samples(released, tmp_path):
    main(["convert", "karlo", str(released), "--out", str(tmp_path / "karlo"), "--head-dim=16", "--size=8"])
    artifact = load_artifact(tmp_path / "karlo")
    config, text = artifact.config, artifact.text
    assert isinstance(config, UnCLIP) and isinstance(text, ClipCaption)
    assert config.sampling == UnCLIPSampler(50, guidance=8.0, clip=True, prior_steps=25, prior_guidance=4.0)
    encoder = text.load()
    ids, mask = text(["a cat", ""])
    assert mask.sum(1).tolist() == [4, 2]
    features = jax.jit(text.features)(encoder, ids, mask)
    assert features.shape == (2, *text.feature_shape) == (2, 9, 64)
    for part in (artifact.model.prior, artifact.model.decoder):  # an empty caption is the unconditional one
        np.testing.assert_allclose(part.condition.caption.encoded.null[...], features[1], atol=1e-5)
    images = jnp.zeros((1, 8, 8, 3))
    assert jax.eval_shape(text.image_features, encoder, images).shape == (1, 64)

    main(["sample", str(tmp_path / "karlo"), "a cat", "--steps=2", "--prior-steps=2", f"--out={tmp_path / 'made'}"])
    assert Image.open(tmp_path / "made" / "00000.png").size == (8, 8)


def test_files_that_are_missing_are_named(released, tmp_path, capsys):
    for file in released.iterdir():
        if "stats" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(SystemExit):
        main(["convert", "karlo", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "one file of the statistics is wanted" in " ".join(capsys.readouterr().err.split())
    save_torch({"mean": np.zeros(3, np.float32)}, tmp_path / "stats.th")
    with pytest.raises(SystemExit):
        main(["convert", "karlo", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "mean and standard deviation of embeddings are wanted" in " ".join(capsys.readouterr().err.split())


def test_training_reads_images_and_captions(released):
    """`prepare` adds embeddings of images to features of captions."""
    from t2i_jax.training.experiment import make_prepare

    text = ClipCaption(str(released / "ViT-L-14.pt"), vocabulary=str(released / "merges.txt"))
    ids, mask = text(["a cat"])
    batch = {"image": np.zeros((1, 8, 8, 3), np.uint8), "text": ids, "text_mask": mask}
    found = jax.eval_shape(make_prepare(None, text), {"text": text.load()}, batch, jax.random.key(0))
    assert found["features"].shape == (1, 9, 64) and found["image_features"].shape == (1, 64)
    assert found["image"].shape == (1, 8, 8, 3)


def test_the_upsampler_gives_its_tensors_back():
    config = dataclasses.replace(
        FAMILIES["upsampler-experts"],
        network=dataclasses.replace(
            FAMILIES["upsampler-experts"].network, last_times=1, width=32, groups=32, scale_shift=False
        ),
    )
    tensors = restore("karlo_sr", config, random(config))
    again, model = convert("karlo_sr", tensors, size=4)
    assert again.network.multipliers == (1, 2) and not again.network.middle_attention
    back = restore("karlo_sr", again, model)
    assert back.keys() == tensors.keys() and all(np.array_equal(back[k], tensors[k]) for k in tensors)
