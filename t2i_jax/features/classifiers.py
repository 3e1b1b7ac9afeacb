"""The frozen image classifiers whose features metrics and losses use: EfficientNet-Lite0 and InceptionV3.

All are built from tables: a convolution is (channels, kernel, stride); its batch norm is folded into its weights when
they are loaded (`t2i_jax.interop`).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t2i_jax.nn.layers import Linear, ModelState, fan_in

# EfficientNet-Lite0 (Tan & Le 2019; Lite: ReLU6, no squeeze-and-excitation): (repeat, kernel, stride, expand, width).

STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
REGIONS = sum(repeat for repeat, *_ in STAGES[:5])
"""Blocks before the last halving."""

# InceptionV3 (Szegedy et al. 2015): a block is its branches, a branch its convolutions after an optional pooling; a
# tuple of convolutions in place of one is a fork. In the network of published FIDs average pooling excludes the
# padding, and the last block pools by maximum where all others average; in torchvision's all average, padding included.

Table = dict[str, tuple]


def _block_a(pool: int) -> Table:
    return {
        "branch1x1": ((64, 1),),
        "branch5x5": ((48, 1), (64, 5)),
        "branch3x3dbl": ((64, 1), (96, 3), (96, 3)),
        "branch_pool": ("mean", (pool, 1)),
    }


def _block_c(c: int) -> Table:
    return {
        "branch1x1": ((192, 1),),
        "branch7x7": ((c, 1), (c, (1, 7)), (192, (7, 1))),
        "branch7x7dbl": ((c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))),
        "branch_pool": ("mean", (192, 1)),
    }


def _block_e(pool: str) -> Table:
    fork = ((384, (1, 3)), (384, (3, 1)))
    return {
        "branch1x1": ((320, 1),),
        "branch3x3": ((384, 1), fork),
        "branch3x3dbl": ((448, 1), (384, 3), fork),
        "branch_pool": (pool, (192, 1)),
    }


MIXED: dict[str, Table] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": {
        "branch3x3": ((384, 3, 2),),
        "branch3x3dbl": ((64, 1), (96, 3), (96, 3, 2)),
        "branch_pool": ("max, halved",),
    },
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": {
        "branch3x3": ((192, 1), (320, 3, 2)),
        "branch7x7x3": ((192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)),
        "branch_pool": ("max, halved",),
    },
    "Mixed_7b": _block_e("mean"),
    "Mixed_7c": _block_e("max"),
}


class Unit(nnx.Module):
    """Convolution, folded batch norm, ReLU up to a ceiling: (b, i, j, c) -> (b, i', j', f)."""

    def __init__(
        self,
        c: int,
        f: int,
        kernel: int | tuple[int, int],
        key: Array,
        *,
        stride: int = 1,
        padding: str = "SAME",
        ceiling: float | None = None,
    ):
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        self.w = ModelState(fan_in(key, (*size, c, f), 2**0.5))
        self.b = ModelState(jnp.zeros(f))
        self.stride, self.padding, self.ceiling = stride, padding, ceiling

    def __call__(self, x: Array) -> Array:
        return jnp.clip(self.linear(x), 0, self.ceiling)

    def linear(self, x: Array) -> Array:
        stride = (self.stride, self.stride)
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, self.w[...], stride, self.padding, dimension_numbers=dimensions) + self.b


class Depthwise(nnx.Module):
    """Depthwise convolution, folded batch norm, ReLU6: (b, i, j, c) -> (b, i', j', c)."""

    def __init__(self, c: int, kernel: int, stride: int, key: Array):
        self.w = ModelState(fan_in(key, (kernel, kernel, c), 2**0.5))
        self.b = ModelState(jnp.zeros(c))
        self.stride = stride

    def __call__(self, x: Array) -> Array:
        # XLA fuses this sum of shifted products into one loop, on a CPU six times as fast as a grouped convolution.
        k, s = self.w.shape[0], self.stride
        i, j = (-(-n // s) for n in x.shape[1:3])
        missing = (max((out - 1) * s + k - n, 0) for out, n in zip((i, j), x.shape[1:3], strict=True))
        y = jnp.pad(x, ((0, 0), *((m // 2, m - m // 2) for m in missing), (0, 0)))
        window = lambda p, q: y[:, p : p + (i - 1) * s + 1 : s, q : q + (j - 1) * s + 1 : s]
        return jnp.clip(sum(window(p, q) * self.w[p, q] for p in range(k) for q in range(k)) + self.b, 0, 6)


class InvertedBottleneck(nnx.Module):
    """Expand by 1x1, filter each channel, project by 1x1 without activation (Sandler et al. 2018, figure 3b)."""

    def __init__(self, c: int, f: int, kernel: int, stride: int, expand: int, key: Array):
        keys = jax.random.split(key, 3)
        self.expand = Unit(c, c * expand, 1, keys[0], ceiling=6) if expand > 1 else None
        self.depthwise = Depthwise(c * expand, kernel, stride, keys[1])
        self.project = Unit(c * expand, f, 1, keys[2])
        self.residual = stride == 1 and c == f

    def __call__(self, x: Array) -> Array:
        y = x if self.expand is None else self.expand(x)
        y = self.project.linear(self.depthwise(y))
        return x + y if self.residual else y


class EfficientNetLite0(nnx.Module):
    """Classifier of 4.7M parameters, trained on ImageNet-1k: (b, i, j, 3) in [0, 255] -> pooled features (b, 1280)."""

    def __init__(self, key: Array):
        keys = iter(jax.random.split(key, 19))
        self.stem = Unit(3, 32, 3, next(keys), stride=2, ceiling=6)
        blocks, c = [], 32
        for repeat, kernel, stride, expand, f in STAGES:
            for r in range(repeat):
                blocks.append(InvertedBottleneck(c, f, kernel, 1 if r else stride, expand, next(keys)))
                c = f
        self.blocks = nnx.List(blocks)
        self.head = Unit(c, 1280, 1, next(keys), ceiling=6)
        self.fc = Linear(1280, 1000, next(keys))

    def __call__(self, images: Array, size: int = 128) -> Array:
        return self.maps(images, size)[1]

    def maps(self, images: Array, size: int = 128) -> tuple[Array, Array]:
        """Images as above -> the last features of a sixteenth of `size`, (b, size/16, size/16, 112), and the pooled."""
        x = jax.image.resize(images, (len(images), size, size, 3), "cubic", antialias=True)
        x = self.stem((jnp.clip(x, 0, 255) - 127) / 128)
        for block in self.blocks[:REGIONS]:
            x = block(x)
        regions = x
        for block in self.blocks[REGIONS:]:
            x = block(x)
        return regions, self.head(x).mean((1, 2))

    def logits(self, features: Array) -> Array:
        """Pooled features (b, 1280) -> ImageNet logits (b, 1000)."""
        return self.fc(features)


class Mixed(nnx.Module):
    """One Inception block: parallel branches, concatenated over channels."""

    def __init__(self, c: int, name: str, key: Array, kind: str):
        self.name, self.kind, self.width = name, kind, 0
        for branch, steps in MIXED[name].items():
            d = c
            for fork in forks(branch, steps):
                for name, f, kernel, *stride in fork:
                    key, k = jax.random.split(key)
                    strided = {"stride": 2, "padding": "VALID"} if stride else {}
                    setattr(self, name, Unit(d, f, kernel, k, **strided))
                d = sum(f for _, f, *_ in fork)
            self.width += d

    def __call__(self, x: Array) -> Array:
        joined = []
        for branch, steps in MIXED[self.name].items():
            y = POOLS[self.kind][steps[0]](x) if isinstance(steps[0], str) else x
            for fork in forks(branch, steps):
                y = jnp.concatenate(
                    [getattr(self, name)(y) for name, *_ in fork], -1
                )  # attribute names come from the table
            joined.append(y)
        return jnp.concatenate(joined, -1)


def forks(branch: str, steps: tuple) -> list[list[tuple]]:
    """The convolutions of a branch with their names: `branch5x5_2`; `branch3x3_2a` and `branch3x3_2b` in a fork."""
    steps = tuple(s for s in steps if not isinstance(s, str))
    number = lambda n: f"{branch}_{n}" if len(steps) > 1 else branch
    return [
        [(number(n) + letter, *s) for letter, s in zip("ab", step, strict=True)]
        if isinstance(step[0], tuple)
        else [(number(n), *step)]
        for n, step in enumerate(steps, 1)
    ]


def max_pool(x: Array, stride: int = 2) -> Array:
    """Maxima of 3x3 windows of (b, i, j, c)."""
    return jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), "SAME" if stride == 1 else "VALID"
    )


def sum_pool(x: Array) -> Array:
    """Sums of 3x3 windows of (b, i, j, c), zeros around it."""
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")


def mean_pool(x: Array) -> Array:
    """Means of 3x3 windows of (b, i, j, c), without the padding."""
    return sum_pool(x) / sum_pool(jnp.ones_like(x[:1, :, :, :1]))


PADDED = lambda x: sum_pool(x) / 9
POOLS = {
    "fid": {"mean": mean_pool, "max": lambda x: max_pool(x, 1), "max, halved": max_pool},
    "torchvision": {"mean": PADDED, "max": PADDED, "max, halved": max_pool},
}


class InceptionLayers(nnx.Module):
    """The convolutions of InceptionV3, as the FID has them or as torchvision does."""

    def __init__(self, key: Array, kind: str):
        keys = iter(jax.random.split(key, 17))
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, next(keys), stride=2, padding="VALID")
        self.Conv2d_2a_3x3 = Unit(32, 32, 3, next(keys), padding="VALID")
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, next(keys))
        self.Conv2d_3b_1x1 = Unit(64, 80, 1, next(keys))
        self.Conv2d_4a_3x3 = Unit(80, 192, 3, next(keys), padding="VALID")
        width = 192
        for name in MIXED:
            block = Mixed(width, name, next(keys), kind)
            setattr(self, name, block)
            width = block.width

    def maps(self, x: Array) -> tuple[Array, Array]:
        """(b, i, j, 3) in [-1, 1] -> Mixed_6e (b, i', j', 768), 17 x 17 of 299 x 299, and pooled Mixed_7c (b, 2048)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool(x)))
        x = regions = max_pool(x)
        for name in MIXED:
            x = getattr(self, name)(x)  # attribute names come from the table
            regions = x if name == "Mixed_6e" else regions
        return regions, x.mean((1, 2))


class InceptionV3(InceptionLayers):
    """The network of the FID (Heusel et al. 2017): (b, i, j, 3) in [0, 255] -> pooled features (b, 2048)."""

    def __init__(self, key: Array):
        keys = jax.random.split(key)
        super().__init__(keys[0], "fid")
        self.fc = Linear(2048, 1008, keys[1])

    def __call__(self, images: Array, size: int = 299) -> Array:
        # Bilinear without antialiasing, as in FID: images larger than 299 alias, in all published numbers too.
        x = jax.image.resize(images, (len(images), size, size, 3), "linear", antialias=False) / 127.5 - 1
        return self.maps(x)[1]

    def logits(self, features: Array) -> Array:
        """Pooled features (b, 2048) -> logits (b, 1008), without the bias, which the Inception Score omits."""
        return features @ self.fc.w[...]
