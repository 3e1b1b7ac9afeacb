"""Guidance by text, by a reference's embedding and by its layout, with classifier-free guidance and any solver."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from PIL import Image

import t2i_jax as t2i
from t2i_jax.cli import main
from t2i_jax.core.family import with_fields
from t2i_jax.core.image_files import save_png
from t2i_jax.core.sharding import MeshConfig, batch_sharding, put_on_mesh, shardings
from t2i_jax.evaluation.agreement import Drawn, difference, layout, measured
from t2i_jax.evaluation.agreement import main as agreement
from t2i_jax.evaluation.matching import Matching
from t2i_jax.models.clip import CLIP
from t2i_jax.noise.processes import Discrete, Flow
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.sampling.solvers import SOLVERS
from t2i_jax.storage.artifacts import Artifact, save_artifact
from t2i_jax.text.damsm import CaptionWords
from tests.fixtures.captions import dictionary
from tests.fixtures.commands import refused
from tests.fixtures.exact import Exact, exact, family_of, time_of
from tests.fixtures.families import FAMILIES

FAMILY = FAMILIES["dit"]
TOWERS = FAMILIES["noised-clip"].towers
DEEP = dataclasses.replace(TOWERS.image, depth=2)
JUDGE = CLIP(dataclasses.replace(TOWERS, image=DEEP), noise=FAMILY.process)
IMAGE = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
KEYS = jax.vmap(jax.random.key)(jnp.arange(4))


def weights(config, seed=0, scale=0.3):
    """Parameters that are all in use: fresh ones have matrices of zeros."""
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(config.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=scale, size=x.shape), x.dtype), shapes)


MODEL, TOWER = weights(FAMILY, scale=0.05), weights(JUDGE, 1)


@partial(jax.tree_util.register_dataclass, data_fields=["conditional", "unconditional"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TwoLaws:
    """The best network of a conditional and an unconditional law."""

    conditional: Exact
    unconditional: Exact

    def read(self, batch, dropped):
        return dropped

    def __call__(self, x: Array, t: Array, dropped, key=None) -> Array:
        return jnp.where(dropped[:, None, None, None], self.unconditional(x, t, None), self.conditional(x, t, None))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize(
    ("process", "solver"),
    [(Discrete("linear"), "ddpm"), (Discrete("linear"), "dpm++"), (Flow(), "heun")],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_a_known_log_density_of_a_reference_moves_the_mean_as_it_must(process, solver, guidance):
    """p(x_0) exp(w r x_0) with p = N(m, s^2) is N(m + w r s^2, s^2), whose noised density has the gradient of log p_t
    and w r a s^2 / (a^2 s^2 + sigma^2); with x'_t = a r + sigma eps in the place of a r, the mean is the same."""
    std, there, here, reference, weight = 0.5, 0.2, 0.6, jnp.asarray([0.9, -0.4]), 2.0
    family = with_fields(family_of(process, 2), condition_dropout=0.1)
    laws = [exact(family, (mean, mean), std**2 * np.eye(2)) for mean in (here, there)]

    def log_p(x, t, condition):
        alpha, sigma = process.alpha_sigma(time_of(process, t), x)
        known = std**2 / (alpha**2 * std**2 + sigma**2)
        return condition["reference_weights"][:, 1] * (condition["reference"] * known * x).sum((1, 2, 3))

    b, options = 3000, DiffusionSampler(60, guidance=guidance)
    rows = jnp.broadcast_to(reference[:, None], (b, 1, 2, 1)), jnp.broadcast_to(jnp.asarray([0, weight, 0]), (b, 3))
    keys = jax.random.split(jax.random.key(1), b)
    condition = dict(zip(("reference", "reference_weights"), rows, strict=True))
    out = family.sample(
        TwoLaws(*laws), condition, keys, options, guided=True, solver=solver, classifier=jax.tree_util.Partial(log_p)
    )
    mean = there + guidance * (here - there) + weight * reference * std**2
    np.testing.assert_allclose(out[:, 0, :, 0].mean(0), mean, atol=0.05)


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "ddpm"])
def test_what_a_classifier_says_of_pure_noise_is_not_followed(solver):
    """The cosine schedule begins at a ratio of signal to noise of 5e-5, where a learned classifier's gradient is its
    error: x0 would be moved by 20,000 times it. ddpm's step is by the variance instead, and bounded."""
    family = with_fields(family_of(Discrete("cosine"), 2), predicts="v")
    law, keys = exact(family, (0.3, -0.2), 0.25 * np.eye(2)), jax.random.split(jax.random.key(1), 8)
    wrong = jax.tree_util.Partial(lambda x, t, condition: jnp.where(t > 990, 1.0, 0.0) * x.sum((1, 2, 3)))
    draw = lambda classifier: family.sample(law, {}, keys, DiffusionSampler(8), solver=solver, classifier=classifier)
    np.testing.assert_allclose(draw(wrong), draw(None), atol=1e-4)


def drawn(reference=None, text_weight=0.0, image_weight=0.0, layout_weight=0.0, scale=1.0):
    """Images in [-1, 1] in fp32, guided unless there is no reference."""
    condition, classifier = {"label": jnp.arange(4) % 3}, None
    options = DiffusionSampler(6, guidance=2.0, classifier_scale=scale, clip=True)
    if reference is not None:
        image = reference[None] / 127.5 - 1
        condition["reference"] = jnp.repeat(jnp.asarray(image, jnp.float32), 4, 0)
        condition["reference_weights"] = jnp.asarray([[text_weight, image_weight, layout_weight]] * 4, jnp.float32)
        classifier = jax.tree_util.Partial(JUDGE.log_p, TOWER)
    return FAMILY.sample(MODEL, condition, KEYS, options, classifier=classifier, guided=True)


def test_weights_of_zero_change_no_bit():
    plain = drawn()
    np.testing.assert_array_equal(drawn(IMAGE), plain)
    np.testing.assert_array_equal(drawn(IMAGE, 0, 1.0, 1.0, scale=0.0), plain)
    assert np.abs(drawn(IMAGE, image_weight=100.0) - plain).max() > 1e-2
    np.testing.assert_array_equal(drawn(IMAGE, layout_weight=9.0), drawn(IMAGE, layout_weight=9.0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StandardNormal:
    """The best network of pixels N(0, 1), in a process that preserves the variance: it predicts sigma x."""

    def read(self, batch, dropped):
        return None

    def __call__(self, x: Array, t: Array, context, key=None) -> Array:
        return FAMILY.process.alpha_sigma(time_of(FAMILY.process, t), x)[1] * x


def test_samples_come_nearer_to_what_guides_them():
    family = with_fields(FAMILY, learn_variance=False)
    tower, b = jax.jit(JUDGE.init)(jax.random.key(2)), 16
    reference = jnp.repeat(jnp.asarray(IMAGE[None] / 127.5 - 1, jnp.float32), b, 0)
    seen = jax.jit(lambda x: tower.images_with_maps(x, jnp.zeros(b, jnp.int32)))

    def found(image_weight, layout_weight):
        """Cosines of embeddings, and distances of maps, of samples and the reference: each (b,)."""
        rows = jnp.asarray([[0, image_weight, layout_weight]] * b, jnp.float32)
        out = family.sample(
            StandardNormal(),
            {"reference": reference, "reference_weights": rows},
            jax.random.split(jax.random.key(3), b),
            DiffusionSampler(20),
            guided=False,
            classifier=jax.tree_util.Partial(JUDGE.log_p, tower),
        )
        (mine, placed), (own, layout) = seen(out), seen(reference)
        return (mine * own).sum(-1), ((placed - layout) ** 2).mean((1, 2))

    free, alike, placed = found(0, 0), found(20, 0), found(0, 30)
    assert (alike[0] - free[0]).mean() > 3 * (alike[0] - free[0]).std() / b**0.5
    assert (free[1] - placed[1]).mean() > 3 * (free[1] - placed[1]).std() / b**0.5
    assert placed[1].mean() < 0.8 * free[1].mean()


def test_the_log_density_is_the_sum_of_its_terms():
    rng, t = np.random.default_rng(1), jnp.asarray([0, 500])
    x, other = (jnp.asarray(rng.normal(size=(2, 4, 4, 3)), jnp.float32) for _ in range(2))
    captions = {"text": jnp.asarray([[1, 2, 3, 0, 0, 0]] * 2), "text_mask": jnp.arange(6)[None].repeat(2, 0) < 3}
    of = jax.jit(
        lambda w, y, condition: JUDGE.log_p(
            TOWER, x, t, condition | {"reference": y, "reference_weights": jnp.asarray([w] * 2, jnp.float32)}
        )
    )
    near = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    text, image, layout = (of(w, other, captions) for w in np.eye(3))
    near(text, JUDGE.log_p(TOWER, x, t, captions))
    near(image, JUDGE.scale_of(TOWER) * (TOWER.images(x, t) * TOWER.images(other, t)).sum(-1))
    near(of(np.asarray([0.5, 2.0, 3.0]), other, captions), 0.5 * text + 2 * image + 3 * layout)
    near(of(np.asarray([1.0, 2.0, 3.0]), other, {}), 2 * image + 3 * layout)
    near(of(np.asarray([0, 1.0, 5.0]), x, {}), JUDGE.scale_of(TOWER))
    assert (layout < -1e-3).all()
    moved = jax.grad(lambda y: of(np.asarray([0, 1.0, 1.0]), y, {}).sum())(other)
    np.testing.assert_array_equal(moved, 0)  # the reference is no path of the gradient


def guide(image=IMAGE, scale=None, **given):
    return t2i.ClassifierGuidance(Artifact(JUDGE, TOWER), scale, reference=t2i.Reference(image, **given))


def test_one_program_draws_with_any_reference_and_weights(traces):
    pipe = t2i.Pipeline.place(FAMILY, MODEL, mesh=MeshConfig(1))
    draw = lambda guide: pipe("1", seeds=[3], steps=6, guidance=2.0, guides=[guide], clip=True)[0]
    images = [draw(guide(text_weight=0.0, image_weight=30.0))]
    before = traces["_sample"]
    assert before
    images += [draw(guide(text_weight=0.0, image_weight=w, layout_weight=v)) for w, v in ((0.0, 0.0), (0.0, 30.0))]
    images += [draw(guide(255 - IMAGE, text_weight=0.0, image_weight=30.0))]
    images += [draw(guide(scale=5.0, text_weight=0.0, image_weight=30.0))]
    assert traces["_sample"] == before
    assert len({image.tobytes() for image in images}) == len(images)
    np.testing.assert_array_equal(images[1], pipe("1", seeds=[3], steps=6, guidance=2.0, clip=True)[0])


def test_a_mesh_draws_what_one_device_does():
    family, tower = with_fields(FAMILY, learn_variance=False), jax.jit(JUDGE.init)(jax.random.key(2))
    reference = np.repeat(IMAGE[None].astype(np.float32) / 127.5 - 1, 4, 0)
    condition = {"reference": reference, "reference_weights": np.asarray([[0, 2, 9]] * 4, np.float32)}

    def draw(*sizes):
        mesh = MeshConfig(*sizes).build(jax.devices()[: math.prod(sizes)])
        with jax.set_mesh(mesh):
            rows = put_on_mesh(condition, batch_sharding(mesh))
            judge = jax.tree_util.Partial(JUDGE.log_p, put_on_mesh(tower, shardings(tower, mesh)))
            options = DiffusionSampler(6)
            return np.asarray(family.sample(StandardNormal(), rows, KEYS, options, guided=False, classifier=judge))

    np.testing.assert_allclose(draw(2, 1, 2), draw(1, 1, 1), atol=2e-3)


def test_what_cannot_guide_is_said():
    classifier = dataclasses.replace(FAMILIES["classifier"], process=FAMILY.process)
    for other, said in (
        (t2i.ClassifierGuidance(Artifact(classifier, {}), reference=t2i.Reference(IMAGE)), "does not compare images"),
        (guide(), "conditioned on captions"),
        (guide(np.zeros((8, 4, 3), np.uint8), text_weight=0.0), r"shape \(8, 4, 3\); this model draws \(4, 4, 3\)"),
    ):
        with pytest.raises(t2i.ConfigError, match=said):
            other.check(FAMILY)
    with pytest.raises(t2i.ConfigError, match="a reference float32"):
        t2i.Reference(IMAGE.astype(np.float32))
    with pytest.raises(t2i.ConfigError, match="layout_weight"):
        t2i.Reference(IMAGE, layout_weight=float("nan"))


def test_the_command_guides_to_a_reference(tmp_path, capsys):
    text = CaptionWords(dictionary(tmp_path / "captions.pickle", ("<end>", "a", "red", "disc")), length=6)
    family = dataclasses.replace(FAMILIES["unet"], process=FAMILY.process)
    t2i.Pipeline.place(family, weights(family, scale=0.05), None, text).save(tmp_path / "model")
    save_artifact(Artifact(JUDGE, TOWER, text=text), tmp_path / "judge", "# CLIP\n")
    Image.fromarray(IMAGE.repeat(3, 0).repeat(2, 1)).save(tmp_path / "image.png")
    sample = ["sample", str(tmp_path / "model"), "a red disc", "--steps=4", "--clip=True"]
    like = ["--reference", str(tmp_path / "image.png")]
    judged = ["--classifier", str(tmp_path / "judge"), "--classifier-scale=30"]
    made = {}
    for name, words in {
        "text": judged,
        "image": [*judged, *like],
        "layout": [*judged, *like, "--layout-weight=9"],
    }.items():
        main([*sample, *words, "--out", str(tmp_path / name)])
        made[name] = Image.open(tmp_path / name / "00000.png")
    assert len({np.asarray(image).tobytes() for image in made.values()}) == 3
    assert "reference" in made["layout"].info and "reference" not in made["text"].info
    assert "--reference without --classifier" in refused(capsys, *sample, *like)
    assert "--layout-weight without --reference" in refused(capsys, *sample, *judged, "--layout-weight=2")


# --- what guidance gains, measured


def test_a_gain_is_that_of_pairs():
    """An interval of paired differences: what both share does not widen it."""
    rng = np.random.default_rng(0)
    plain, gain = rng.normal(0, 10, 400), rng.normal(0.5, 1, 400)
    found = difference(plain, plain + gain)
    low, high = found["interval"]
    assert low < 0.5 < high and high - low == pytest.approx(2 * 1.96 * gain.std(ddof=1) / 20, rel=0.01)
    assert found["gain"] == pytest.approx(found["guided"] - found["plain"], abs=2e-4)
    with pytest.raises(ValueError, match="two pairs"):
        difference(plain[:1], plain[:1])


def test_layout_is_of_the_means_of_squares():
    reference = np.zeros((4, 4, 3), np.uint8)
    images = np.stack([reference, reference, reference])
    images[1, :2, :2] = 255  # a quarter of the image is white
    images[2, 0, 0], images[2, 3, 3] = 255, 255
    np.testing.assert_allclose(layout(images, reference, 2), [0, 0.25, 2 * 0.25 / 4])
    np.testing.assert_allclose(layout(images, reference, 8), [0, 0.25, 2 / 16])
    with pytest.raises(ValueError, match="cannot be cut"):
        layout(images, reference, 3)


def test_agreement_is_with_the_own_prompt_and_the_own_reference():
    """By a judge for which the colour of an image is its embedding, and the names of colours are theirs."""
    colours = {"red": (1.0, 0, 0), "green": (0, 1.0, 0), "blue": (0, 0, 1.0)}
    judge = Matching(
        lambda images: images.mean((1, 2)).astype(np.float32) + 1e-6,
        lambda texts: np.asarray([colours.get(text, (1.0, 1.0, 1.0)) for text in texts], np.float32),
    )
    flat = lambda name: np.broadcast_to(np.asarray(colours[name]) * 255, (4, 4, 3)).astype(np.uint8)
    drawn = lambda said, shown: Drawn(np.stack([flat(c) for c in shown]), tuple(said), ("0",) * len(said))
    plain = [drawn(["red", ""], ["blue", "blue"]), drawn(["green", "red"], ["green", "green"])]
    guided = [drawn(["red", ""], ["red", "green"]), drawn(["green", "red"], ["green", "red"])]
    found = measured(judge, plain, guided, [flat("green"), flat("red")])
    assert found["images"] == 4
    assert found["text"]["plain"] == pytest.approx(1 / 3, abs=1e-3)  # the row without a prompt does not count
    assert found["text"]["guided"] == pytest.approx(1, abs=1e-3)
    assert (found["image"]["plain"], found["image"]["guided"]) == (
        pytest.approx(0, abs=1e-3),
        pytest.approx(0.5, abs=1e-3),
    )
    assert found["layout"]["gain"] == pytest.approx(-1 / 3, abs=1e-3)
    assert "image" not in measured(judge, plain, guided)


def test_agreement_refuses_folders_that_are_no_pairs(tmp_path):
    for folder, seed in (("a", 0), ("b", 1)):
        (tmp_path / folder).mkdir()
        for n in range(2):
            about = {"prompt": "a red heart", "seed": str(seed + n)}
            save_png(np.zeros((4, 4, 3), np.uint8), tmp_path / folder / f"{n}.png", metadata=about)
    (tmp_path / "c").mkdir()
    save_png(np.zeros((4, 4, 3), np.uint8), tmp_path / "c" / "0.png")
    call = lambda *some: agreement(["configs/semantic_diffusion.py", "--by", "docs/results/clip", *some])
    folder = lambda name: str(tmp_path / name)
    with pytest.raises(t2i.ConfigError, match="not of the same prompts and seeds"):
        call("--plain", folder("a"), "--guided", folder("b"))
    with pytest.raises(t2i.ConfigError, match="does not say its prompt"):
        call("--plain", folder("a"), "--guided", folder("c"))
    with pytest.raises(t2i.ConfigError, match="2 folders; --plain has 1"):
        call("--plain", folder("a"), "--guided", folder("a"), folder("b"))
    with pytest.raises(t2i.ConfigError, match="1 images for 2 pairs"):
        call("--plain", folder("a"), folder("a"), "--guided", folder("a"), folder("a"), "--references", folder("x"))
