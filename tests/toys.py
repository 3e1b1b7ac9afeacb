"""The smallest trainables and data: what tests of the trainer need and nothing more."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import reduce, repeat
from flax import nnx

from t2i_jax.core.sharding import MeshConfig, shard
from t2i_jax.core.specs import CodecSpec, CodeSpec, FieldSpec, SampleSpec
from t2i_jax.core.types import Capabilities, Compute, LossOutput, Objective, single_objective
from t2i_jax.nn.layers import Embedding, Linear, ModelState
from t2i_jax.noise.processes import along
from t2i_jax.sampling.guidance import guide
from t2i_jax.sampling.tokens import sample_token
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Batches of random vectors; example n is a function of n alone."""

    batch_size: int = 16
    width: int = 8
    image_size: int = 8

    def describe(self):
        return {"train": {"records": 2**31}}

    def batches(self, text=None, position=0, rows=None, split="train", spec=None):
        while True:
            places = [position + row for row in (range(self.batch_size) if rows is None else rows)]
            yield {"x": np.stack([np.random.default_rng(g).normal(size=self.width) for g in places]).astype(np.float32)}
            position += self.batch_size


class FactorTables(nnx.Module):
    """An embedding of each number of a code; they are added."""

    def __init__(self, sizes, width, key):
        self.table = Embedding(sum(sizes), width, key)
        self.first = tuple(int(n) for n in np.cumsum((0, *sizes[:-1])))

    def __call__(self, x):
        return self.table(x + jnp.asarray(self.first)).sum(-2)


@dataclasses.dataclass(frozen=True)
class Factors:
    """A head of several small whole numbers for each position, each with a softmax of its own given z."""

    sizes: tuple[int, ...] = (3, 2, 4)

    knows_probability = True

    @property
    def code(self):
        return CodeSpec("int32", (len(self.sizes),), self.sizes)

    def init(self, key, width):
        return Linear(width, sum(self.sizes), key)

    def entrance(self, key, width):
        return FactorTables(self.sizes, width, key)

    def empty(self, b, t):
        return jnp.zeros((b, t, len(self.sizes)), jnp.int32)

    def logits(self, module, z):
        ends = np.cumsum(self.sizes)[:-1]
        return jnp.split(module(z).astype(jnp.float32), ends, -1)

    def loss(self, module, z, x, key, train=True):
        return -sum(self.log_p(logits, x[..., i]) for i, logits in enumerate(self.logits(module, z)))

    def log_p(self, logits, x):
        return jnp.take_along_axis(jax.nn.log_softmax(logits), x[..., None], -1)[..., 0]

    def sample(self, module, z, null, draws, guidance, options):
        each = self.logits(module, z)
        if null is not None:
            each = [guide(a, b, guidance) for a, b in zip(each, self.logits(module, null), strict=True)]
        drawn = [sample_token(logits, options, draws.uniform(i)) for i, logits in enumerate(each)]
        return jnp.stack(drawn, -1), sum(map(self.log_p, each, drawn))


class Plain:
    """What a trainable declares that is nothing but trained, in fp32."""

    capabilities, compute = Capabilities(), Compute()

    def with_compute(self, compute):
        return self


@dataclasses.dataclass(frozen=True)
class Toward:
    """alpha = cos, sigma = sin of an angle from 0 to 1.5: a noise process that offers what the contract says alone."""

    max_steps: int = 8
    scale = 2.0
    solver = "ddim"
    starts_from_pure_noise = False
    time_levels = None
    variance_bound = None

    def same_noise(self, other):
        return isinstance(other, Toward)

    def quantile(self, u):
        return 1.5 * u

    def alpha_sigma(self, t, like):
        t = t.reshape(t.shape + (1,) * (like.ndim - t.ndim))
        return jnp.cos(t), jnp.sin(t)

    def network_time(self, t):
        return 100 * t

    def timesteps(self, steps, stride=False, spacing="default"):
        t = jnp.maximum(1.5 * (1 - jnp.arange(self.max_steps + 1) / steps), 0)
        return along(self.network_time(t), jnp.cos(t), jnp.sin(t), steps)


class Net(nnx.Module):
    def __init__(self, width, depth, key):
        self.layers = jax.vmap(lambda k: Linear(width, width, k, std=None))(jax.random.split(key, depth))
        self.seen = ModelState(jnp.zeros(()))

    def __call__(self, x):
        return jax.lax.scan(lambda x, layer: (shard(jnp.tanh(layer(x)), "batch", "embed"), None), x, self.layers)[0]


@dataclasses.dataclass(frozen=True)
class Identity(Plain):
    """Learns to reproduce its input; counts batches in a carried value."""

    width: int = 8
    depth: int = 3
    noise: float = 0.01

    def init(self, key):
        return Net(self.width, self.depth, key)

    def batch_spec(self):
        return {"x": FieldSpec((self.width,), "float32")}

    def objectives(self):
        return single_objective(self.loss)

    def loss(self, model, batch, key, train=True):
        x = batch["x"] + self.noise * jax.random.normal(key, batch["x"].shape)
        loss = jnp.mean((model(x) - batch["x"]) ** 2)
        counted = jax.tree.map(lambda v: v, model)
        counted.seen = ModelState(model.seen[...] + 1)
        return LossOutput(loss, {"rms": jnp.sqrt(loss)}, counted)


class Pair(nnx.Module):
    def __init__(self, width, key):
        self.artist = Linear(width, width, key, std=None)
        self.critic = Linear(width, 1, key, std=None)


@dataclasses.dataclass(frozen=True)
class Game(Plain):
    """Two objectives on one model."""

    width: int = 8

    def init(self, key):
        return Pair(self.width, key)

    def batch_spec(self):
        return {"x": FieldSpec((self.width,), "float32")}

    def objectives(self):
        fake = lambda m, b: jnp.mean(m.critic(m.artist(b["x"])))
        artist = lambda m, b, key, step, train: LossOutput(-fake(m, b), {})
        critic = lambda m, b, key, step, train: LossOutput(fake(m, b) - jnp.mean(m.critic(b["x"])), {})
        return {"artist": Objective(artist, ("artist",)), "critic": Objective(critic, ("critic",))}


@dataclasses.dataclass(frozen=True)
class Squares(Plain):
    """A codec without weights: the code of a 4x4 square is its brightness."""

    vocabulary: int = 8
    factor: int = 4
    capabilities = Capabilities(codec=True)

    @property
    def spec(self):
        return CodecSpec(self.factor, CodeSpec("int32", sizes=(self.vocabulary,)))

    def init(self, key):
        return {}

    def batch_spec(self):
        return {"image": FieldSpec((None, None, 3), "float32", multiple=self.factor)}

    def encode(self, model, images, key=None):
        mean = reduce(images, "b (h p) (w q) c -> b h w", "mean", p=self.factor, q=self.factor)
        return jnp.clip((mean + 1) * 4, 0, 7).astype(jnp.int32)

    def to_store(self, model, images):
        return {"codes": self.encode(model, images)}

    def decode(self, model, codes):
        return repeat(codes, "b h w -> b (h p) (w q) c", p=self.factor, q=self.factor, c=3) / 4 - 1


@dataclasses.dataclass(frozen=True)
class Pixels(Plain):
    """A codec whose codes are the pixels themselves."""

    capabilities = Capabilities(codec=True)
    spec = CodecSpec(1, CodeSpec("float32", (3,)))

    def encode(self, model, images, key=None):
        return images

    def decode(self, model, codes):
        return codes


@dataclasses.dataclass(frozen=True)
class Labels(Numbers):
    """Batches of classes, and codes of them that are all the same."""

    def batches(self, text=None, position=0, rows=None, split="train", spec=None):
        for batch in super().batches(text, position, rows, split, spec):
            label = (batch["x"][:, 0] > 0).astype(np.int32)
            yield {"label": label, "codes": np.tile(7 * label[:, None, None], (1, 2, 2))}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Heat:
    """Sampling options of the user's own."""

    temperature: float = 1.0

    def arrays(self):
        return Heat(jnp.asarray(self.temperature, jnp.float32))


@dataclasses.dataclass(frozen=True)
class Histogram(Plain):
    """A family that offers what every family has to and no more: each code by itself, from logits of its class."""

    capabilities = Capabilities(family=True)

    def sample_spec(self):
        return SampleSpec((2, 2), CodeSpec("int32", sizes=(8,)))

    def condition_spec(self):
        return {"label": FieldSpec((), "int32", 0, 1)}

    def batch_spec(self):
        return {"codes": self.sample_spec().field, **self.condition_spec()}

    def init(self, key):
        return Embedding(2, 2 * 2 * 8, key)

    def objectives(self):
        return single_objective(self.loss)

    def logits(self, model, label):
        return model(label).reshape(-1, 2, 2, 8)

    def loss(self, model, batch, key, train=True):
        nll = optax.softmax_cross_entropy_with_integer_labels(self.logits(model, batch["label"]), batch["codes"])
        return LossOutput(nll.mean(), {})

    def options(self):
        return Heat()

    def check(self, options):
        pass

    def loop_trips(self, options):
        return 1

    def sample(self, model, condition, keys, options=None, *, guided=None, progress=None):
        logits = self.logits(model, condition["label"]) / (options or Heat()).temperature
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def experiment(model=Identity(), data=Numbers(), mesh=None, **train):
    settings = {"steps": 6, "optimizer": Optimizer(learning_rate=1e-2, warmup=2), "ema": 0.9, "log_every": 1} | train
    settings = {"evaluate_every": 0, "preview_every": 0, "save_every": 3} | settings
    return Experiment(model, data, Train(**settings), mesh or MeshConfig())
