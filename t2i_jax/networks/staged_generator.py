"""Generators in stages: a small image first, then stages that refine its features at twice the size.

StackGAN (Zhang et al. 2017, arXiv:1612.03242), StackGAN++ (Zhang et al. 2018, arXiv:1710.10916), AttnGAN (Xu et al.
2018, arXiv:1711.10485) and DM-GAN (Zhu et al. 2019, arXiv:1904.01310) differ in what a refining stage mixes into the
features: `Joint`, `WordAttention`, `DynamicMemory`, or `Redraw`, which begins with the image. Networks have running
statistics, so each call returns the renewed module.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from t2i_jax.core.arrays import Bool, Float, typed
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import SAMPLED, Checked, Layers, Size
from t2i_jax.core.sharding import shard
from t2i_jax.networks.condition import Context
from t2i_jax.nn.batch_norm import BatchNorm
from t2i_jax.nn.conv import Upsample
from t2i_jax.nn.conv_block import ACTIVATIONS, ConvBlock, Gate, NormedResidual, channels_before, in_turn, with_vector
from t2i_jax.nn.layers import Conv, Linear, at_least_fp32, replace

# -- conditioning augmentation


@dataclasses.dataclass(frozen=True)
class Augmentation(Checked):
    """Conditioning augmentation: the generator reads a sample of N(mean, variance), both computed from the sentence."""

    size: Size = 100
    """numbers of the sample"""
    gate: Gate = "glu"
    """activation of mean and log variance; with "relu", as in StackGAN, neither is negative"""


class Code(NamedTuple):
    """Samples of conditioning augmentation and their distribution, each (b, c) fp32."""

    sample: Array
    mean: Array
    log_variance: Array


class Augmenting(nnx.Module):
    """A sentence (b, k) and noise (b, c) -> `Code`: mean + exp(log variance / 2) noise (Zhang et al. 2017, 3.2)."""

    def __init__(self, config: Augmentation, k: int, key: Array):
        self.config = config
        self.fc = Linear(k, channels_before(config.gate, 2 * config.size), key, std=None, axes=("embed", None))

    def __call__(self, sentence: Array, noise: Array) -> Code:
        mean, log_variance = jnp.split(ACTIVATIONS[self.config.gate](self.fc(at_least_fp32(sentence))), 2, -1)
        return Code(mean + jnp.exp(log_variance / 2) * noise, mean, log_variance)


# -- what a stage reads and gives


class Inputs(NamedTuple):
    """What all stages read."""

    context: Context | None
    """the sentence as `pooled` and the words as `tokens`; its mask is (b, p, s), by position, with `published_masks`;
    None: an unconditional generator"""
    noise: Array
    """(b, n), in the dtype of the computation"""
    augmentation: Array
    """noise of the conditioning augmentations, one after the other (b, m c)"""


class StageOutput(NamedTuple):
    """What a stage gives."""

    features: Array
    """(b, i, j, w), in the dtype of the computation"""
    image: Array
    """(b, i, j, 3) in [-1, 1], fp32"""
    code: Code | None
    """the code that this stage has read"""
    seen: Mapping[str, Array]
    """`attention` (b, i, j, s) over words; the gates, keys and values of a memory"""


Mixed = tuple[Array, Mapping[str, Array]]
"""features (b, i, j, 2 f) of a stage that ends with f channels, and `StageOutput.seen`"""


class Mixer(Protocol):
    """A module that mixes the condition into features h (b, i, j, w)."""

    def __call__(self, h: Array, code: Array, inputs: Inputs, train: bool) -> tuple[Mixed, Self]: ...


class StageBlock(Protocol):
    """The config of a block that begins a refining stage."""

    @property
    def residuals(self) -> int:
        """Residual blocks that follow it."""
        ...

    def mixed(self, w: int) -> int:
        """Channels of the mixed features, of w; the stage ends with half as many."""
        ...

    def init(self, w: int, c: int, k: int, gate: Gate, key: Array) -> Mixer:
        """w: channels of features, c: numbers of the code, k: size of a word."""
        ...


# -- blocks that mix the condition into features


@dataclasses.dataclass(frozen=True)
class Joint(Checked):
    """The code at every position, joined to the features by a convolution (StackGAN++); halves the channels."""

    residuals: Layers = 2
    condition_first: bool = True
    """order of the channels: code and features, or features and code"""

    def mixed(self, w: int) -> int:
        return w

    def init(self, w: int, c: int, k: int, gate: Gate, key: Array) -> JointMixer:
        return JointMixer(self, w, c, gate, key)


class JointMixer(nnx.Module):
    """Features (b, i, j, w) and a code (b, c) -> (b, i, j, w)."""

    def __init__(self, config: Joint, w: int, c: int, gate: Gate, key: Array):
        keys, f = jax.random.split(key), channels_before(gate, w)
        self.config = config
        self.conv = ConvBlock(Conv(c + w, f, keys[0], bias=False), BatchNorm(f, keys[1]), gate)

    def __call__(self, h: Array, code: Array, inputs: Inputs, train: bool) -> tuple[Mixed, Self]:
        y, conv = self.conv(with_vector(h, code, self.config.condition_first), train)
        return (y, {}), replace(self, conv=conv)


@dataclasses.dataclass(frozen=True)
class WordAttention(Checked):
    """Every position attends to the projected words, and reads the sum along with its features (AttnGAN, eq. 2)."""

    residuals: Layers = 2

    def mixed(self, w: int) -> int:
        return 2 * w

    def init(self, w: int, c: int, k: int, gate: Gate, key: Array) -> WordAttentionMixer:
        return WordAttentionMixer(w, k, key)


class WordAttentionMixer(nnx.Module):
    """Features (b, i, j, w) and words (b, s, k) -> features and what they read of the words (b, i, j, 2 w)."""

    def __init__(self, w: int, k: int, key: Array):
        self.project = Linear(k, w, key, bias=False, std=None, axes=(None, None))

    def __call__(self, h: Array, code: Array, inputs: Inputs, train: bool) -> tuple[Mixed, Self]:
        words = self.project(inputs.context.tokens.astype(h.dtype))
        read, attention = attended(h, words, words, inputs.context.mask)
        return (jnp.concatenate([h, read], -1), {"attention": attention}), self


@typed
def attended(
    h: Float[Array, "b i j w"], keys: Float[Array, "b s w"], values: Float[Array, "b s w"], mask: Bool[Array, "b ... s"]
) -> tuple[Float[Array, "b i j w"], Float[Array, "b i j s"]]:
    """Values (b, s, w) read by positions h (b, i, j, w) by the softmax of <h, key>: (b, i, j, w), and the attention
    (b, i, j, s) fp32; mask: bool (b, s), or (b, i j, s)."""
    logits = jnp.einsum("bijw,bsw->bijs", h, keys, preferred_element_type=jnp.promote_types(h.dtype, jnp.float32))
    mask = mask[:, None, None] if mask.ndim == 2 else mask.reshape(logits.shape)
    attention = jax.nn.softmax(jnp.where(mask, logits, -1e30))  # finite: a caption may have no words
    return jnp.einsum("bijs,bsw->bijw", attention.astype(h.dtype), values), attention


@dataclasses.dataclass(frozen=True)
class DynamicMemory(Checked):
    """Words are written into a memory by what the image shows, and read by every position (DM-GAN, eqs. 3 to 8)."""

    residuals: Layers = 2

    def mixed(self, w: int) -> int:
        return 2 * w

    def init(self, w: int, c: int, k: int, gate: Gate, key: Array) -> MemoryMixer:
        return MemoryMixer(w, k, key)


class MemoryMixer(nnx.Module):
    """With words x (b, s, k), features h and r their mean over positions, through which no gradient goes:

    g = sigmoid(A x + B r), m = g relu(M x) + (1 - g) relu(R r), keys relu(K m), values relu(V m),
    read = values under softmax <h, key>, q = sigmoid(Q [h, read]), h' = (1 - q) h + q read, given twice.
    """

    def __init__(self, w: int, k: int, key: Array):
        keys = jax.random.split(key, 7)
        linear = lambda d, f, key, bias=True: Linear(d, f, key, bias=bias, std=None, axes=(None, None))
        self.gate_words = linear(k, 1, keys[0], False)
        self.gate_image = linear(w, 1, keys[1], False)
        self.write_words = linear(k, 2 * w, keys[2])
        self.write_image = linear(w, 2 * w, keys[3])
        self.key = linear(2 * w, w, keys[4])
        self.value = linear(2 * w, w, keys[5])
        self.response = linear(2 * w, 1, keys[6])

    def __call__(self, h: Array, code: Array, inputs: Inputs, train: bool) -> tuple[Mixed, Self]:
        words = inputs.context.tokens.astype(h.dtype)
        image = jax.lax.stop_gradient(at_least_fp32(h).mean((1, 2)))[:, None].astype(h.dtype)
        gate = jax.nn.sigmoid(self.gate_words(words) + self.gate_image(image))
        memory = gate * jax.nn.relu(self.write_words(words)) + (1 - gate) * jax.nn.relu(self.write_image(image))
        keys, values = jax.nn.relu(self.key(memory)), jax.nn.relu(self.value(memory))
        read, attention = attended(h, keys, values, inputs.context.mask)
        response = jax.nn.sigmoid(self.response(jnp.concatenate([h, read], -1)))
        h = h * (1 - response) + response * read
        seen = {"attention": attention, "writing_gate": gate, "key": keys, "value": values, "response_gate": response}
        return (jnp.concatenate([h, h], -1), seen), self


# -- stages


class FirstStage(nnx.Module):
    """Noise and code -> features and the first image: a linear layer onto 4 x 4 positions, blocks that double them."""

    def __init__(self, config: StagedGenerator, c: int, key: Array):
        keys = iter(jax.random.split(key, 3 + 2 * config.doublings))
        w, gate = config.width << config.doublings, config.gate
        self.config, self.channels = config, channels_before(gate, w)
        self.fc = Linear(config.noise + c, 16 * self.channels, next(keys), bias=False, std=None, axes=("embed", None))
        self.norm = BatchNorm(16 * self.channels, next(keys))
        self.up = nnx.List([doubling(w >> n, (w >> n) // 2, gate, keys) for n in range(config.doublings)])
        self.out = Conv(config.width, 3, next(keys), bias=False)

    def __call__(self, code: Code | None, inputs: Inputs, train: bool) -> tuple[StageOutput, FirstStage]:
        parts = [inputs.noise] if code is None else [code.sample, inputs.noise]
        y = jnp.concatenate(parts[::-1] if self.config.noise_first else parts, -1).astype(inputs.noise.dtype)
        y, norm = self.norm(self.fc(y), train)
        # The gate splits channels, which are counted first in the features of the linear layer.
        y = ACTIVATIONS[self.config.gate](rearrange(y, "b (c i j) -> b i j c", i=4, j=4))
        h, up = in_turn(self.up, shard(y, "batch", None, None, None), train)
        return StageOutput(h, to_image(self.out, h), code, {}), replace(self, norm=norm, up=up)


def doubling(c: int, f: int, gate: Gate, keys: Iterator[Array]) -> ConvBlock:
    """A block that doubles both sides: (b, i, j, c) -> (b, 2i, 2j, f)."""
    wide = channels_before(gate, f)
    return ConvBlock(Upsample(c, next(keys), wide, bias=False), BatchNorm(wide, next(keys)), gate)


def to_image(out: Conv, h: Array) -> Array:
    """The image (b, i, j, 3) in [-1, 1], fp32, of features (b, i, j, w)."""
    return jnp.tanh(at_least_fp32(out(h)))


class RefiningStage(nnx.Module):
    """Features and image of a stage -> those of twice the size: a `StageBlock`, residual blocks, doubling."""

    def __init__(self, block: StageBlock, config: StagedGenerator, w: int, c: int, k: int, key: Array):
        keys, mixed = iter(jax.random.split(key, 4 + block.residuals)), block.mixed(w)
        self.mixer = block.init(w, c, k, config.gate, next(keys))
        self.residuals = nnx.List([NormedResidual(mixed, config.gate, next(keys)) for _ in range(block.residuals)])
        self.up = doubling(mixed, mixed // 2, config.gate, keys)
        self.out = Conv(mixed // 2, 3, next(keys), bias=False)

    def __call__(self, last: StageOutput, inputs: Inputs, train: bool) -> tuple[StageOutput, RefiningStage]:
        code = inputs.noise if last.code is None else last.code.sample
        (h, seen), mixer = self.mixer(shard(last.features, "batch", None, None, None), code, inputs, train)
        h, residuals = in_turn(self.residuals, h, train)
        h, up = self.up(h, train)
        return StageOutput(h, to_image(self.out, h), last.code, seen), replace(
            self, mixer=mixer, residuals=residuals, up=up
        )


@dataclasses.dataclass(frozen=True)
class Redraw(Checked):
    """A stage that makes the image anew at four times the size: it encodes the image, joins a code of its own and
    decodes (StackGAN's second stage). No gradient goes into the image: the stages are trained apart."""

    width: Size = 192
    """channels of the first convolution; doubled at each of two halvings"""
    residuals: Layers = 4


class RedrawingStage(nnx.Module):
    """The image (b, i, j, 3) of a stage -> features and image of four times the size."""

    HALVINGS, DOUBLINGS = 2, 4

    def __init__(self, config: Redraw, generator: StagedGenerator, k: int, key: Array):
        keys, gate, w = iter(jax.random.split(key, 20 + config.residuals)), generator.gate, config.width
        self.augmenting = Augmenting(generator.augmentation, k, next(keys))
        self.stem = Conv(3, w, next(keys), bias=False)
        self.down = nnx.List([halving(w << n, 2 * w << n, gate, keys) for n in range(self.HALVINGS)])
        w <<= self.HALVINGS
        join = Joint(condition_first=False)
        self.mixer = join.init(w, generator.augmentation.size, k, gate, next(keys))
        self.residuals = nnx.List([NormedResidual(w, gate, next(keys)) for _ in range(config.residuals)])
        self.up = nnx.List([doubling(w >> n, w >> n + 1, gate, keys) for n in range(self.DOUBLINGS)])
        self.out = Conv(w >> self.DOUBLINGS, 3, next(keys), bias=False)

    def __call__(self, last: StageOutput, inputs: Inputs, train: bool) -> tuple[StageOutput, RedrawingStage]:
        code = self.augmenting(inputs.context.pooled, inputs.augmentation[:, -self.augmenting.config.size :])
        x = jax.lax.stop_gradient(last.image).astype(inputs.noise.dtype)
        h, down = in_turn(self.down, jax.nn.relu(self.stem(x)), train)
        (h, seen), mixer = self.mixer(h, code.sample, inputs, train)
        h, residuals = in_turn(self.residuals, h, train)
        h, up = in_turn(self.up, h, train)
        after = replace(self, down=down, mixer=mixer, residuals=residuals, up=up)
        return StageOutput(h, to_image(self.out, h), code, seen), after


def halving(c: int, f: int, gate: Gate, keys: Iterator[Array]) -> ConvBlock:
    """A block that halves both sides: (b, 2i, 2j, c) -> (b, i, j, f)."""
    wide = channels_before(gate, f)
    conv = Conv(c, wide, next(keys), kernel=4, stride=2, padding=((1, 1), (1, 1)), bias=False)
    return ConvBlock(conv, BatchNorm(wide, next(keys)), gate)


# -- the generator


Stage = Joint | WordAttention | DynamicMemory | Redraw


@dataclasses.dataclass(frozen=True)
class StagedGenerator(Checked):
    """Sizes and stages of a generator. By default those of AttnGAN for birds: 64, 128 and 256 pixels a side."""

    size: Size = 256
    """rows and columns of the last image, a power of two"""
    width: Size = 32
    """channels of the features of the first image; doubled at each halving of the size down to 4 x 4"""
    noise: Size = 100
    stages: tuple[Stage, ...] = (WordAttention(), WordAttention())
    """stages after the first; each doubles the size, and `Redraw`, which can only be the last, makes it fourfold"""
    augmentation: Augmentation = Augmentation()
    gate: Gate = "glu"
    """activation of all blocks"""
    noise_first: bool = False
    """order of the inputs of the first stage: code and noise, or noise and code"""
    published_masks: Annotated[bool, SAMPLED] = False
    """read other captions' masks of words, as the programs of AttnGAN and DM-GAN do: position p of image r of b reads
    mask (r positions + p) mod b"""

    def __post_init__(self):
        super().__post_init__()
        if any(isinstance(stage, Redraw) for stage in self.stages[:-1]):
            raise ConfigError("network.stages: a Redraw can only be the last")
        first = self.size >> sum(map(enlargement, self.stages))
        if first < 8 or first & (first - 1) or self.sizes[-1] != self.size:
            least = 8 << sum(map(enlargement, self.stages))
            raise ConfigError(f"network.size {self.size}: a power of two, at least {least} with these stages")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows and columns of each image."""
        doublings = itertools.accumulate(map(enlargement, self.stages), initial=0)
        return tuple((self.size >> sum(map(enlargement, self.stages))) << n for n in doublings)

    @property
    def doublings(self) -> int:
        """Blocks of the first stage that double its size, from 4 x 4."""
        return int(math.log2(self.sizes[0] // 4))

    @property
    def augments(self) -> tuple[bool, ...]:
        """The stages of a conditional generator that have a conditioning augmentation of their own."""
        return True, *(isinstance(stage, Redraw) for stage in self.stages)

    def check_condition(self, conditional: bool) -> None:
        """Errors: `ConfigError` for stages that need a condition where there is none."""
        for stage in self.stages:
            if not conditional and not isinstance(stage, Joint):
                raise ConfigError(f"network.stages: a {type(stage).__name__} reads a condition, and there is none")

    def init(self, k: int, key: Array) -> Generator:
        """k: size of words and sentence; 0 for an unconditional generator."""
        return Generator(self, k, key)


def enlargement(stage: Stage) -> int:
    """How often a stage doubles the size."""
    return 2 if isinstance(stage, Redraw) else 1


class Generator(nnx.Module):
    """A condition and noise -> `StageOutput` of every stage, and the renewed generator."""

    def __init__(self, config: StagedGenerator, k: int, key: Array):
        keys, c = jax.random.split(key, 2 + len(config.stages)), config.augmentation.size if k else config.noise
        self.config = config
        self.augmenting = Augmenting(config.augmentation, k, keys[0]) if k else None
        self.first = FirstStage(config, c if k else 0, keys[1])
        stages, w = [], config.width
        for stage, key in zip(config.stages, keys[2:], strict=True):
            if isinstance(stage, Redraw):
                stages.append(RedrawingStage(stage, config, k, key))
            else:
                stages.append(RefiningStage(stage, config, w, c, k, key))
                w = stage.mixed(w) // 2
        self.stages = nnx.List(stages)

    def __call__(
        self, context: Context | None, noise: Array, augmentation: Array, dtype: DTypeLike, train: bool
    ) -> tuple[tuple[StageOutput, ...], Generator]:
        """context: sentence and words, None for an unconditional generator; noise: (b, n) fp32; augmentation: noise of
        the conditioning augmentations (b, m c) fp32, one after the other; dtype: of the computation."""
        inputs = Inputs(context, noise.astype(dtype), augmentation)
        code = None
        if self.augmenting is not None and context is not None:
            code = self.augmenting(context.pooled, augmentation[:, : self.config.augmentation.size])
        output, first = self.first(code, inputs, train)
        outputs, stages = [output], []
        for size, stage in zip(self.config.sizes, self.stages, strict=False):
            if self.config.published_masks and context is not None:
                inputs = inputs._replace(context=context._replace(mask=published_mask(context.mask, size**2)))
            output, after = stage(output, inputs, train)
            outputs.append(output)
            stages.append(after)
        return tuple(outputs), replace(self, first=first, stages=nnx.List(stages))


@typed
def published_mask(mask: Bool[Array, "b s"], positions: int) -> Bool[Array, "b p s"]:
    """The mask (b, p, s) of words for each of p positions that the programs of AttnGAN and DM-GAN use: row r p + n of
    their product, of image r and position n, has the mask of caption (r p + n) mod b."""
    b = len(mask)
    return mask[jnp.arange(b * positions).reshape(b, positions) % b]
