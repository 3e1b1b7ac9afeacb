"""A pipeline is a value: threads share it, and calls that differ in arrays alone share what is compiled."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import t2i_jax as t2i
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.sampler import GREY
from t2i_jax.storage.artifacts import Artifact
from tests.fixtures import toys
from tests.fixtures.families import FAMILIES

FAMILY = FAMILIES["dit"]
IMAGE = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
MASK = np.arange(16).reshape(4, 4) < 5


def weights(config, seed=0, scale=0.05):
    """Parameters that are all in use: fresh ones have matrices of zeros."""
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(config.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=scale, size=x.shape), x.dtype), shapes)


def pipeline_of(seed=0):
    return t2i.Pipeline.place(FAMILY, weights(FAMILY, seed), mesh=MeshConfig(1))


@pytest.fixture
def compiled():
    """The names of programs that are compiled within the test."""
    found = []

    def listener(event, seconds, **facts):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(facts)

    jax.monitoring.register_event_duration_secs_listener(listener)
    yield found
    jax.monitoring.unregister_event_duration_listener(listener)


def test_threads_share_a_pipeline(compiled):
    pipe = pipeline_of()

    def draw(seed, together=lambda: None):
        seen = {}
        preview = lambda share, codes: seen.update({share: codes})
        together()
        images = pipe(["0", "1"], seeds=[seed, seed + 1], steps=4, guidance=2.0, on_preview=preview)
        return images, seen

    alone = [draw(seed) for seed in (3, 30)]
    assert [sorted(seen) for _, seen in alone] == [[0.25, 0.5, 0.75, 1.0]] * 2
    assert compiled
    compiled.clear()
    barrier = threading.Barrier(2, timeout=60)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            for found, wanted in zip(pool.map(draw, (3, 30), [barrier.wait] * 2), alone, strict=True):
                jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert not compiled


def test_arrays_do_not_recompile(compiled):
    classifier = dataclasses.replace(FAMILIES["classifier"], process=FAMILY.process)
    judges = [Artifact(classifier, weights(classifier, seed, 0.3)) for seed in (1, 2)]
    worse = [Artifact(FAMILY, weights(FAMILY, 3, scale)) for scale in (0.05, 0.5)]

    def draw(pipe, edit, *guides, **options):
        return pipe("0", seeds=[5], steps=4, edit=edit, guides=guides, **options)

    calls = [
        (t2i.Inpaint(IMAGE, MASK), t2i.ClassifierGuidance(judges[0], 300.0), t2i.Autoguidance(worse[0])),
        (t2i.Inpaint(255 - IMAGE, MASK), t2i.ClassifierGuidance(judges[0], 300.0), t2i.Autoguidance(worse[0])),
        (t2i.Inpaint(IMAGE, ~MASK), t2i.ClassifierGuidance(judges[0], 300.0), t2i.Autoguidance(worse[0])),
        (t2i.Inpaint(IMAGE, MASK), t2i.ClassifierGuidance(judges[1], 300.0), t2i.Autoguidance(worse[0])),
        (t2i.Inpaint(IMAGE, MASK), t2i.ClassifierGuidance(judges[0], 5000.0), t2i.Autoguidance(worse[0])),
        (t2i.Inpaint(IMAGE, MASK), t2i.ClassifierGuidance(judges[0], 300.0), t2i.Autoguidance(worse[1])),
        (t2i.InitImage(IMAGE, 0.5), t2i.ClassifierGuidance(judges[0], 300.0), t2i.Autoguidance(worse[0])),
    ]
    images = [draw(pipeline_of(), *calls[0], guidance=2.0)]
    assert compiled
    compiled.clear()
    images += [draw(pipeline_of(), *call, guidance=2.0) for call in calls[1:]]
    images += [draw(pipeline_of(9), *calls[0], guidance=2.0), draw(pipeline_of(), *calls[0], guidance=3.0)]
    assert not compiled
    assert len({image.tobytes() for image in images}) == len(images)


def test_a_pipeline_is_frozen():
    pipe = pipeline_of()
    with pytest.raises(dataclasses.FrozenInstanceError):
        pipe.family = FAMILY  # pyright: ignore[reportAttributeAccessIssue]
    other = dataclasses.replace(pipe, model=pipeline_of(9).model)
    np.testing.assert_array_equal(other("0", steps=4), pipeline_of(9)("0", steps=4))


class Cropped(type(FAMILY)):
    """Says that its samples are larger than they are."""

    def sample(self, model, condition, keys, options=None, **more):
        return super().sample(model, condition, keys, options, **more)[:, 1:]


def test_a_family_that_breaks_its_word_is_named():
    family = Cropped(**{f.name: getattr(FAMILY, f.name) for f in dataclasses.fields(FAMILY)})
    pipe = t2i.Pipeline.place(family, weights(FAMILY), mesh=MeshConfig(1))
    with pytest.raises(AssertionError, match=r"\(1, 3, 4, 3\) but.*\(1, 4, 4, 3\).*Cropped.sample, by its sample_"):
        pipe(["0"], seeds=[0], steps=1)


def test_guides_that_do_not_go_together_are_refused():
    guide = t2i.Autoguidance(Artifact(FAMILY, {}))
    with pytest.raises(t2i.ConfigError, match="two guides of one kind"):
        pipeline_of()("0", guides=[guide, guide])


def test_codes_that_are_not_drawn_yet_are_grey():
    family = FAMILIES["ar"]
    pipe = t2i.Pipeline.place(
        family, weights(family), Artifact(toys.Squares(family.vocabulary), {}), mesh=MeshConfig(1)
    )
    seen = {}
    pipe(0, on_preview=lambda share, codes: seen.update({share: codes}))
    first, last = seen[min(seen)], seen[max(seen)]
    assert (first < 0).any() and (last >= 0).all()
    images = pipe.sampler().decode(first)
    assert (images[np.repeat(np.repeat(first < 0, 4, 1), 4, 2)] == GREY).all()
    np.testing.assert_array_equal(pipe.sampler().decode(last), pipe(0))
