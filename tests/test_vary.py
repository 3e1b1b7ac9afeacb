"""Images like a given one, or between two: embeddings in place of those of captions, for any family that reads them."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from t2i_jax.cli import main
from t2i_jax.core.config import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.edits import Blend, Vary, along_circle, embedding_field
from t2i_jax.evaluation.features import Space
from t2i_jax.evaluation.run import retrieved, variations
from t2i_jax.models.unclip import UnCLIP
from t2i_jax.networks.condition import CrossAttnFeatures, PooledFeatures
from t2i_jax.networks.unclip import NoisedImageAndTokens
from t2i_jax.noise.processes import Discrete
from t2i_jax.pipeline import Pipeline
from t2i_jax.text.clip import ClipCaption, ClipEmbedding
from tests.fixtures.clip_files import random_clip
from tests.fixtures.families import FAMILIES, NOISED_DECODER
from tests.fixtures.published_models import random

IMAGES = np.zeros((2, 12, 8, 3), np.uint8)
IMAGES[0, :, ::2], IMAGES[1, ::3, :, :2] = 255, 200  # far apart for any network


def test_the_way_between_embeddings_is_an_arc():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 6)).astype(np.float32)
    lengths = [np.linalg.norm(x, axis=1) for x in (a, b)]
    angle = np.arccos(np.sum(a * b, 1) / lengths[0] / lengths[1])
    for share in (0.0, 0.25, 0.5, 1.0):
        x = along_circle(a, b, share)
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), (1 - share) * lengths[0] + share * lengths[1], rtol=1e-5)
        turned = np.arccos(np.clip(np.sum(a * x, 1) / lengths[0] / np.linalg.norm(x, axis=1), -1, 1))
        np.testing.assert_allclose(turned, share * angle, atol=1e-3)
    np.testing.assert_allclose(along_circle(a, a, 0.3), a, rtol=1e-5)
    assert np.isfinite(along_circle(a, np.zeros_like(a), 0.5)).all()


@pytest.fixture(scope="module", params=["prior", "features"])
def pipeline(request, tmp_path_factory):
    """A decoder of embeddings of images, and a model that reads them as features of captions."""
    path = tmp_path_factory.mktemp("clip")
    if request.param == "prior":
        what = NoisedImageAndTokens(CrossAttnFeatures(16, 9), 16, 16, Discrete("cosine", 20))
        network = with_fields(NOISED_DECODER.network, condition=what)
        family = UnCLIP(None, dataclasses.replace(NOISED_DECODER, network=network, predicts="x0"))
        text = ClipCaption(random_clip(path, 16))
    else:
        family = with_fields(FAMILIES["dit"], condition=PooledFeatures(12), predicts="x0")
        text = ClipEmbedding(random_clip(path))
    return Pipeline.place(family, jax.tree.map(lambda x: 0.3 * x, random(family)), None, text)


def test_images_are_like_a_given_one_or_between_two(pipeline):
    draw = lambda like: pipeline(["", ""], seeds=[0, 0], like=like, steps=2, guidance=1.0).astype(int)
    one, other = (draw(Vary(image)) for image in IMAGES)
    assert (one[0] == one[1]).all() and np.abs(one - other).max() > 1
    np.testing.assert_allclose(draw(Blend(*IMAGES, share=0.0)), one, atol=1)
    np.testing.assert_allclose(draw(Blend(*IMAGES, share=1.0)), other, atol=1)
    between = draw(Blend(*IMAGES))
    assert np.abs(between - one).max() > 1 and np.abs(between - other).max() > 1
    about = pipeline.sampler(like=Vary(IMAGES[0])).about
    assert about["like"] != pipeline.sampler(like=Vary(IMAGES[1])).about["like"]
    assert about["like"] != pipeline.sampler(like=Blend(*IMAGES)).about["like"]


def test_evaluation_asks_whether_an_image_finds_what_it_was_made_of(pipeline):
    options = dataclasses.replace(pipeline.options, steps=2, guidance=1.0)
    made = variations(pipeline, IMAGES, [0, 3], options)
    for image, seed, drawn in zip(IMAGES, (0, 3), made, strict=True):
        again = pipeline([""], seeds=[seed], like=Vary(image), steps=2, guidance=1.0)
        np.testing.assert_allclose(drawn, again[0], atol=1)
    space = Space("pixels", 8, lambda x: x.reshape(len(x), -1) / np.float32(255))
    assert retrieved(IMAGES, IMAGES, [space])["pixels/top1"].value == 1
    assert retrieved(IMAGES[::-1], IMAGES, [space])["pixels/top1"].value == 0


def test_what_has_no_embeddings_of_images_is_refused(pipeline):
    with pytest.raises(ConfigError, match="uint8"):
        pipeline(["cat"], like=Vary(IMAGES[0].astype(np.float32)))
    with pytest.raises(ConfigError, match="share 2.0"):
        Blend(*IMAGES, share=2.0)
    with pytest.raises(ConfigError, match="a Diffusion on this text side reads no embeddings of images"):
        embedding_field(FAMILIES["dit"], pipeline.text)
    captions = dataclasses.replace(pipeline.text, images=False) if isinstance(pipeline.text, ClipCaption) else None
    with pytest.raises(ConfigError, match="no encoder of images"):
        embedding_field(FAMILIES["unclip"], captions)


def test_the_command_takes_images_in_place_of_prompts(pipeline, tmp_path, capsys):
    pipeline.save(tmp_path / "model")
    files = [str(tmp_path / f"{n}.png") for n in range(2)]
    for image, file in zip(IMAGES, files, strict=True):
        Image.fromarray(image).save(file)
    sample = ["sample", str(tmp_path / "model"), "--steps=2", "--guidance=1"]
    main([*sample, "--vary", files[0], "--out", str(tmp_path / "vary")])
    main([*sample, "--blend", *files, "--share=0.0", "--out", str(tmp_path / "blend")])
    made = [np.asarray(Image.open(tmp_path / name / "00000.png")).astype(int) for name in ("vary", "blend")]
    np.testing.assert_allclose(made[0], pipeline("", seeds=[0], like=Vary(IMAGES[0]), steps=2, guidance=1.0)[0], atol=1)
    np.testing.assert_allclose(*made, atol=1)
    for words, said in (
        (["--vary", files[0], "--blend", *files], "--vary with --blend"),
        (["cat", "--share=0.5"], "--share without --blend"),
        ([], "no prompt"),
    ):
        with pytest.raises(SystemExit):
            main([*sample, *words, "--out", str(tmp_path / "out")])
        assert said in " ".join(capsys.readouterr().err.split())
