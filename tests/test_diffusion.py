"""The family: what is learned, what a sample depends on, options that do not compile anew, text, formats."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.trigonometric import Trigonometric
from t2i_jax.convert import convert, restore
from t2i_jax.core.config import ConfigError, from_json, override, to_json
from t2i_jax.core.family import with_fields
from t2i_jax.edits import InitImage, Inpaint
from t2i_jax.guides import Autoguidance, ClassifierGuidance
from t2i_jax.models import diffusion
from t2i_jax.models.clip import CLIP
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.models.noised_classifier import NoisedClassifier
from t2i_jax.networks.clip import CLIPTowers
from t2i_jax.networks.condition import CaptionEncoder, ClassEmbedder
from t2i_jax.networks.dit import DiT
from t2i_jax.networks.unet import UNet
from t2i_jax.nn.transformer import Transformer
from t2i_jax.noise.processes import EDM, Discrete, Flow
from t2i_jax.pipeline import Pipeline
from t2i_jax.sampling import solvers
from t2i_jax.sampling.options import DiffusionSampler, plain_options
from t2i_jax.storage.artifacts import Artifact
from tests.fixtures.families import with_aux

SMALL = with_fields(
    DiT(),
    size=(4, 4),
    channels=3,
    patch=2,
    width=32,
    depth=2,
    heads=2,
    frequency_dim=32,
    condition=ClassEmbedder(3),
)
FAMILY = Diffusion(SMALL, Discrete("cosine", 50), sampling=DiffusionSampler(steps=4, guidance=2.0))
TEXT = CaptionEncoder(20, 5, width=16, depth=1, heads=2)
LITTLE = with_fields(
    UNet(),
    size=(8, 8),
    width=32,
    multipliers=(1, 2),
    blocks=1,
    attention=(2,),
    head_dim=16,
    condition=ClassEmbedder(3),
)


def keys_of(*seeds):
    return jax.vmap(jax.random.key)(jnp.asarray(seeds))


def shaken(model, scale=0.05):
    """Zero-initialised layers say nothing before training: a little noise makes every part count."""
    leaves, tree = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    return tree.unflatten([x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


@pytest.fixture(scope="module")
def model():
    return shaken(jax.jit(FAMILY.init)(jax.random.key(0)))


def test_options_are_traced_and_pictures_depend_on_their_own_key_only(model, traces):
    label = jnp.asarray([0, 1, 2])
    whole = FAMILY.sample(model, {"label": label}, keys_of(5, 6, 7))
    assert whole.shape == (3, 4, 4, 3) and np.isfinite(whole).all()
    traces.clear()
    for options in (
        DiffusionSampler(steps=9, guidance=1.0, guidance_rescale=0.7, clip=True),
        DiffusionSampler(steps=50, guidance=7.5, guidance_start=0.2, guidance_stop=0.8, stride=True, eta=0.3),
    ):
        assert np.isfinite(FAMILY.sample(model, {"label": label}, keys_of(5, 6, 7), options)).all()
    assert not traces["_sample"]
    turned = FAMILY.sample(model, {"label": label[::-1]}, keys_of(7, 6, 5))
    np.testing.assert_allclose(turned[::-1], whole, rtol=1e-4, atol=1e-4)


def test_solvers_do_what_their_names_say_unless_told_otherwise(model):
    draw = lambda **options: FAMILY.sample(
        model, {"label": jnp.zeros(2, int)}, keys_of(1, 2), DiffusionSampler(5, guidance=1.0), **options
    )
    told = lambda eta, solver: FAMILY.sample(
        model, {"label": jnp.zeros(2, int)}, keys_of(1, 2), DiffusionSampler(5, guidance=1.0, eta=eta), solver=solver
    )
    for solver, eta in {"ddim": 0.0, "dpm++": 0.0, "ddpm": 1.0}.items():
        np.testing.assert_array_equal(draw(solver=solver), told(eta, solver))
        assert float(jnp.abs(draw(solver=solver) - told(1 - eta, solver)).max()) > 1e-2
    np.testing.assert_allclose(told(0.0, "ddim"), told(0.0, "euler"), atol=1e-5)
    np.testing.assert_array_equal(draw(), draw(solver="ddpm"))
    fixed = dataclasses.replace(SMALL, learn_variance=False)
    own = [Diffusion(fixed, *x).solver for x in ((Discrete(),), (Flow(), "velocity"), (EDM(), "v"))]
    assert own == ["ddpm", "euler", "heun"] and Diffusion(fixed, Flow(), "v", solver="unipc").solver == "unipc"


def test_stored_configs_of_before_mean_what_they_meant():
    """They name solver and eta, and lack options that are newer."""
    stored = to_json(dataclasses.replace(FAMILY, solver="ddim", sampling=DiffusionSampler(eta=1.0)))
    newer = ("spacing", "guidance_low_snr", "guidance_high_snr", "resample")
    stored["sampling"] = {k: v for k, v in stored["sampling"].items() if k not in newer}
    found = from_json(stored)
    assert found.solver == "ddim" and float(found.options().eta_of("ddim")) == 1.0
    assert found == dataclasses.replace(FAMILY, solver="ddim", sampling=DiffusionSampler(eta=1.0))
    assert from_json(json.loads(json.dumps(to_json(FAMILY), allow_nan=False))) == FAMILY


def test_sampling_options_are_flags():
    given = {"eta": "none", "spacing": "karras", "guidance-low-snr": "-2.5", "guidance-high-snr": "4", "resample": "5"}
    found = override(DiffusionSampler(eta=0.5), [word for k, v in given.items() for word in (f"--{k}", v)])
    assert found == DiffusionSampler(spacing="karras", guidance_low_snr=-2.5, guidance_high_snr=4.0, resample=5)
    assert override(DiffusionSampler(), ["--eta", "0.5"]).eta == 0.5
    assert plain_options(found) | {"eta": None, "spacing": "karras", "resample": 5.0} == plain_options(found)
    again = found.arrays().arrays()
    assert again.spacing == "karras" and np.isnan(again.eta) and float(again.eta_of("ddpm")) == 1.0
    assert np.isinf(DiffusionSampler().arrays().guidance_high_snr) and float(again.guidance_low_snr) == -2.5


@pytest.mark.parametrize("spacing", ["even", "karras", "log_snr"])
def test_stops_may_be_spaced_anew(model, spacing):
    run = lambda **options: FAMILY.sample(
        model, {"label": jnp.zeros(2, int)}, keys_of(1, 2), DiffusionSampler(12, guidance=1.0, **options), solver="heun"
    )
    default, other = run(), run(spacing=spacing)
    assert np.isfinite(other).all() and 0 < float(jnp.abs(other - default).mean()) < 0.2 * float(default.std())
    with pytest.raises(ValueError, match="spacing 'odd': one of default, even, karras, log_snr"):
        run(spacing="odd")


@pytest.mark.parametrize("process", [Discrete("linear"), Flow(), Flow(shift=3.0), EDM()], ids=str)
def test_an_interval_of_log_snr_is_one_of_noise_levels(process):
    """Whatever the number of steps and their spacing; shares of steps narrow it further."""
    low, high = -1.0, 3.0
    for steps, spacing in ((10, "default"), (50, "default"), (20, "even"), (30, "karras"), (30, "log_snr")):
        path = process.timesteps(steps, spacing=spacing)
        alpha, sigma = (np.asarray(x, np.float64)[:steps] for x in (path.alpha, path.sigma))
        with np.errstate(divide="ignore"):
            level = np.log(alpha**2 / sigma**2)
        places = jnp.arange(steps)
        at = places, steps, 2 * solvers.log_ratio(path, places)
        scales = lambda at=at, **options: np.asarray(
            DiffusionSampler(guidance=5.0, **options).arrays().guidance_at(*at)
        )
        inside = (level >= low) & (level < high)
        assert 0 < inside.sum() < steps
        np.testing.assert_array_equal(scales(guidance_low_snr=low, guidance_high_snr=high), np.where(inside, 5, 1))
        np.testing.assert_array_equal(scales(guidance_low_snr=low), np.where(level >= low, 5, 1))
        np.testing.assert_array_equal(scales(), 5)
        half = scales(guidance_low_snr=low, guidance_high_snr=high, guidance_stop=0.5)
        np.testing.assert_array_equal(half, np.where(inside & (np.arange(steps) < steps / 2), 5, 1))


def test_guidance_keeps_to_its_interval_of_log_snr(model):
    draw = lambda guidance=4.0, **options: FAMILY.sample(
        model, {"label": jnp.zeros(2, int)}, keys_of(1, 2), DiffusionSampler(6, guidance=guidance, **options)
    )
    none, whole = draw(1.0), draw()
    np.testing.assert_array_equal(draw(guidance_low_snr=-100.0, guidance_high_snr=100.0), whole)
    np.testing.assert_allclose(draw(guidance_low_snr=50.0), none, rtol=1e-4, atol=1e-4)
    part = draw(guidance_low_snr=-1.0, guidance_high_snr=2.0)
    assert min(float(jnp.abs(part - x).max()) for x in (none, whole)) > 1e-3


@pytest.mark.parametrize("solver", ["heun", "unipc"])
def test_more_steps_of_a_deterministic_solver_change_little(model, solver):
    run = lambda n: FAMILY.sample(
        model, {"label": jnp.zeros(2, int)}, keys_of(1, 2), DiffusionSampler(n, guidance=1.0), solver=solver
    )
    fine, coarse = run(50), run(25)
    assert float(jnp.abs(fine - coarse).mean()) < 0.1 * float(fine.std())


def test_known_pixels_are_kept_and_given_pictures_are_remembered(model):
    given = jnp.tanh(jax.random.normal(jax.random.key(3), (2, 4, 4, 3)))
    keep = (jnp.arange(4) < 2)[None, :, None] & jnp.ones((2, 4, 4), bool)
    near = dict(known=given, keep=jnp.zeros_like(keep))
    run = lambda options, **given: FAMILY.sample(model, {"label": jnp.zeros(2, int)}, keys_of(1, 2), options, **given)
    filled = run(DiffusionSampler(10, guidance=1.0), known=given, keep=keep)
    np.testing.assert_allclose(filled[:, :2], given[:, :2], atol=1e-5)
    assert float(jnp.abs(filled[:, 2:] - given[:, 2:]).max()) > 0.1
    gaps = [
        float(jnp.abs(run(DiffusionSampler(50, guidance=1.0, strength=s), **near) - given).mean()) for s in (0.04, 0.9)
    ]
    assert gaps[0] < 0.5 * gaps[1]


@pytest.mark.slow  # a training step of each compiles for some seconds
@pytest.mark.parametrize(
    "family",
    [
        dataclasses.replace(FAMILY, network=with_fields(SMALL, via="cross_attention", condition=TEXT)),
        Diffusion(with_fields(SMALL, via="joint", condition=TEXT, learn_variance=False), Flow(), "velocity"),
        Diffusion(with_fields(SMALL, via="context", condition=TEXT, learn_variance=False), EDM(), "v"),
        Diffusion(with_fields(LITTLE, size=(4, 4), context=16, condition=TEXT), weight="min_snr"),
    ],
    ids=["cross", "joint, flow", "context, edm", "unet"],
)
def test_every_kind_learns_and_reads_its_text(family):
    rng = np.random.default_rng(0)
    batch = {"text": rng.integers(0, 20, (8, 5)), "text_mask": np.ones((8, 5), bool)}
    colour = np.where(batch["text"][:, :1] < 10, -0.6, 0.6).astype(np.float32)
    batch |= {"image": np.broadcast_to(colour[:, :, None, None], (8, 4, 4, 3))}
    batch = jax.tree.map(jnp.asarray, batch)
    model, tx = jax.jit(family.init)(jax.random.key(0)), optax.adam(3e-3)

    @jax.jit
    def trained(model):
        def step(carry, key):
            model, state = carry
            (_, output), slopes = jax.value_and_grad(with_aux(family.loss), has_aux=True)(model, batch, key)
            updates, state = tx.update(slopes, state)
            return (optax.apply_updates(model, updates), state), output.metrics["mse"]

        return jax.lax.scan(step, (model, tx.init(model)), jax.random.split(jax.random.key(1), 40))

    (after, _), errors = trained(model)
    assert float(errors[-8:].mean()) < 0.9 * float(errors[:4].mean())
    outs = jax.jit(lambda m, b: m(batch["image"], jnp.full(8, 20.0), m.read(b, jnp.zeros(8, bool))))
    other = batch | {"text": (batch["text"] + 10) % 20}
    assert float(jnp.abs(outs(after, batch) - outs(after, other)).max()) > 1e-4
    drop = jax.jit(lambda m, b: m.read(b, jnp.ones(8, bool)))
    chex.assert_trees_all_equal(drop(after, batch), drop(after, other))


@pytest.mark.slow
def test_a_classifier_and_an_image_text_model_guide(model):
    classifier = NoisedClassifier(with_fields(LITTLE, size=(4, 4), conditioning=None), 3)
    tower = Transformer(16, 1, 2, norm="layer", activation="gelu", bias=True)
    towers = CLIPTowers(tower, tower, dim=8, vocabulary=20, length=5, last=True, size=4, patch=2, times=50)
    small = CLIP(towers, noise=FAMILY.process)
    batch = {
        "label": jnp.asarray([0, 1]),
        "text": jnp.asarray([[1, 2, 3, 4, 5]] * 2),
        "text_mask": jnp.ones((2, 5), bool),
    }
    image = {"image": jnp.zeros((2, 4, 4, 3))}
    for config in (classifier, small):
        weights = shaken(jax.jit(config.init)(jax.random.key(1)))
        assert np.isfinite(jax.jit(config.loss)(weights, batch | image, jax.random.key(2)).loss)
        puller = jax.tree_util.Partial(config.log_p, weights)
        options = [DiffusionSampler(8, guidance=1.0, classifier_scale=s, clip=True) for s in (0.0, 30.0)]
        free, held = (FAMILY.sample(model, batch, keys_of(1, 2), o, classifier=puller, guided=False) for o in options)
        score = jax.jit(lambda x, p=puller: p(x, jnp.zeros(2), batch))
        assert score(held).mean() > score(free).mean()


@pytest.mark.slow
def test_a_pipeline_remembers_pictures_and_is_guided_by_other_models(model):
    pipeline = Pipeline.place(FAMILY, model, None, None)
    picture = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)

    def draw(edit=None, *guides, **options):
        return pipeline("0", seeds=[5], steps=6, edit=edit, guides=guides, **options)[0].astype(int)

    mask = np.arange(16).reshape(4, 4) < 5
    filled = draw(Inpaint(picture, mask), guidance=1.0)
    assert np.abs(filled - picture)[~mask].max() <= 1 and (filled != picture)[mask].any()
    gap = lambda s: np.abs(draw(InitImage(picture, s), guidance=1.0) - picture).mean()
    assert gap(0.2) < gap(1.0)
    trunk = with_fields(LITTLE, size=(4, 4), conditioning=None)
    classifier = NoisedClassifier(trunk, 3, process=FAMILY.process)
    judge = Artifact(classifier, shaken(jax.jit(classifier.init)(jax.random.key(1))))
    free, pulled = (draw(None, ClassifierGuidance(judge, s), guidance=1.0, clip=True) for s in (0.0, 30.0))
    assert (free != pulled).any()
    assert (draw(None, Autoguidance(Artifact(FAMILY, shaken(model, 0.02))), guidance=3.0) != free).any()
    with pytest.raises(ConfigError, match="does not classify"):
        ClassifierGuidance(Artifact(FAMILY, model)).check(FAMILY)
    with pytest.raises(ConfigError, match="it learned the noise of Discrete"):
        ClassifierGuidance(Artifact(NoisedClassifier(trunk, 3), judge.model)).check(FAMILY)
    with pytest.raises(ConfigError, match="a NoisedClassifier cannot guide"):
        Autoguidance(judge).check(FAMILY)
    smaller = dataclasses.replace(FAMILY, network=with_fields(SMALL, depth=1, width=16, learn_variance=False))
    weak = Artifact(smaller, shaken(jax.jit(smaller.init)(jax.random.key(2))))
    assert (draw(None, Autoguidance(weak), guidance=3.0) != free).any()


def test_a_worse_model_guides(model):
    plain, guided = (
        FAMILY.sample(
            model,
            {"label": jnp.zeros(2, int)},
            keys_of(1, 2),
            DiffusionSampler(6, guidance=s),
            guide_model=shaken(model, 0.02),
        )
        for s in (1.0, 3.0)
    )
    alone = FAMILY.sample(model, {"label": jnp.zeros(2, int)}, keys_of(1, 2), DiffusionSampler(6), guided=False)
    np.testing.assert_allclose(plain, alone, rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(guided - plain).max()) > 1e-3


def test_a_worse_model_need_agree_in_what_is_said_alone():
    weak = dataclasses.replace(FAMILY, solver="heun", sampling=DiffusionSampler(7), network=with_fields(SMALL, depth=1))
    Autoguidance(Artifact(weak, {})).check(FAMILY)
    other = with_fields(SMALL, condition=ClassEmbedder(5))
    for odd, what in (
        ({"predicts": "v"}, "predicts"),
        ({"process": Discrete()}, "process"),
        ({"network": other}, "cond"),
    ):
        with pytest.raises(ConfigError, match=what):
            Autoguidance(Artifact(with_fields(FAMILY, **odd), {})).check(FAMILY)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="learn_variance"):
        Diffusion(SMALL, Flow())
    with pytest.raises(ValueError, match="solver 'rk4': one of"):
        dataclasses.replace(FAMILY, solver="rk4")
    fixed = dataclasses.replace(SMALL, learn_variance=False)
    for process in (Flow(), Discrete(zero_terminal_snr=True), Discrete("jsd")):
        for predicts in ("eps", "score"):
            with pytest.raises(ValueError, match="noise alone"):
                Diffusion(fixed, process, predicts)
    Diffusion(fixed, EDM(), "eps")
    for process in (EDM(), Flow(toward=True)):
        with pytest.raises(ValueError, match="not indices of noise levels"):
            CLIP(CLIPTowers(times=1000), noise=process)
    with pytest.raises(ValueError, match="times 50: this Discrete has 1000"):
        CLIP(CLIPTowers(times=50), noise=Discrete("cosine"))
    CLIP(CLIPTowers(times=1000), noise=Flow())
    for name, value in (("steps", 0), ("steps", 51), ("strength", 0.0), ("strength", 1.5), ("noise_aug", 2.0)):
        with pytest.raises(ValueError, match=name):
            FAMILY.check(dataclasses.replace(DiffusionSampler(), **{name: value}))
    FAMILY.check(DiffusionSampler(50, strength=0.5))
    with pytest.raises(ValueError, match="low_res"):
        diffusion.join_inputs(jnp.zeros((1, 4, 4, 3)), {}, ("low_res",))


@pytest.mark.parametrize("resample", ["block", "conv", "mean"])
@pytest.mark.parametrize("form", ["adm", "adm_classifier"])
def test_published_names_there_and_back(form, resample):
    shape = dataclasses.replace(LITTLE, multipliers=(1, 2, 2), blocks=2, resample=resample, scale_shift=False)
    family = with_fields(
        Diffusion(),
        network=with_fields(shape, condition=ClassEmbedder(3, null=False)),
        condition_dropout=0.0,
    )
    pools = ("attention",) if resample != "mean" else ("adaptive", "spatial", "spatial_v2")
    trunk = with_fields(shape, conditioning=None)
    for config in [family] if form == "adm" else [NoisedClassifier(trunk, 5, pool) for pool in pools]:
        model = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(config.init, jax.random.key(0)))
        theirs = restore(form, config, model)
        found, again = convert(form, theirs, size=8, head_dim=16)
        ours = getattr(config, "network", None) or config.trunk
        theirs_now = getattr(found, "network", None) or found.trunk
        fields = ("width", "multipliers", "blocks", "attention", "scale_shift", "resample")
        assert [getattr(ours, f) for f in fields] == [getattr(theirs_now, f) for f in fields]
        assert jax.tree.structure(again) == jax.tree.structure(jax.eval_shape(found.init, jax.random.key(0)))


def test_sit_is_dit_on_a_flow():
    network = dataclasses.replace(SMALL, size=(8, 8), channels=4)
    flow = {
        "process": Flow("uniform", toward=True),
        "predicts": "drift",
        "solver": "heun",
        "discard_variance_output": True,
    }
    family = with_fields(
        Diffusion(), network=network, **flow, guided_channels=3, sampling=DiffusionSampler(guidance=4.0, eta=0.0)
    )
    model = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(family.init, jax.random.key(0)))
    theirs = restore("sit", family, model)
    found, _ = convert("sit", theirs, heads=2)
    assert dataclasses.replace(found, network=with_fields(found.network, mlp=0)) == family
    assert restore("dit", family, model).keys() == theirs.keys()


@pytest.mark.parametrize("process", [Discrete(), Flow(), EDM(), Trigonometric()], ids=lambda p: type(p).__name__)
def test_noise_is_the_same_where_times_and_stops_alone_differ(process):
    flow = {"times": "uniform", "shift": 3.0, "max_steps": 7}
    fields = {"Flow": flow, "EDM": {"mean": 0.0, "high": 70.0, "rho": 3.0}}
    assert process.same_noise(dataclasses.replace(process, **fields.get(type(process).__name__, {})))
    odd = {"Discrete": {"steps": 10}, "Flow": {"toward": True}, "EDM": {"data": 0.7}}.get(type(process).__name__)
    assert odd is None or not process.same_noise(dataclasses.replace(process, **odd))
    assert not any(process.same_noise(p) for p in (Discrete(), Flow(), EDM()) if type(p) is not type(process))
