"""The smallest trainables and data: what tests of the trainer need and nothing more."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t2i_jax.nn.layers import Carried, Linear
from t2i_jax.nn.players import Player
from t2i_jax.parallel import MeshConfig, shard
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Batches of random vectors; example n is a function of n alone."""

    batch_size: int = 16
    width: int = 8
    image_size: int = 8

    def batches(self, text=None, position=0, process=0, count=1, split="train"):
        while True:
            rows = range(position + process, position + self.batch_size, count)
            yield {"x": np.stack([np.random.default_rng(i).normal(size=self.width) for i in rows]).astype(np.float32)}
            position += self.batch_size


class Net(nnx.Module):
    def __init__(self, width, depth, key):
        self.layers = jax.vmap(lambda k: Linear(width, width, k, std=None))(jax.random.split(key, depth))
        self.seen = Carried(jnp.zeros(()))

    def __call__(self, x):
        return jax.lax.scan(lambda x, layer: (shard(jnp.tanh(layer(x)), "batch", "embed"), None), x, self.layers)[0]


@dataclasses.dataclass(frozen=True)
class Identity:
    """Learns to reproduce its input; counts batches in a carried value."""

    width: int = 8
    depth: int = 3
    noise: float = 0.01

    def init(self, key):
        return Net(self.width, self.depth, key)

    def loss(self, model, batch, key):
        x = batch["x"] + self.noise * jax.random.normal(key, batch["x"].shape)
        loss = jnp.mean((model(x) - batch["x"]) ** 2)
        counted = jax.tree.map(lambda v: v, model)
        counted.seen = Carried(model.seen[...] + 1)
        return loss, ({"rms": jnp.sqrt(loss)}, counted)


class Pair(nnx.Module):
    def __init__(self, width, key):
        self.artist = Linear(width, width, key, std=None)
        self.critic = Linear(width, 1, key, std=None)


@dataclasses.dataclass(frozen=True)
class Game:
    """Two players on one model."""

    width: int = 8

    def init(self, key):
        return Pair(self.width, key)

    def players(self):
        artist = lambda m, b, key, step: (-jnp.mean(m.critic(m.artist(b["x"]))), {})
        critic = lambda m, b, key, step: (jnp.mean(m.critic(m.artist(b["x"]))) - jnp.mean(m.critic(b["x"])), {})
        return {"artist": Player(artist, ("artist",)), "critic": Player(critic, ("critic",))}


def experiment(model=Identity(), data=Numbers(), mesh=None, **train):
    settings = {"steps": 6, "optimizer": Optimizer(learning_rate=1e-2, warmup=2), "ema": 0.9, "log_every": 1} | train
    settings = {"evaluate_every": 0, "preview_every": 0, "save_every": 3} | settings
    return Experiment(model, data, Train(**settings), mesh or MeshConfig())
