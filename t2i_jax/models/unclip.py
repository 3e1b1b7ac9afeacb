"""unCLIP: a prior draws the embedding of an image from a caption, a decoder the image from both (Ramesh et al. 2022).

P(x | y) = P(x | z, y) P(z | y) for an image x, its CLIP embedding z and a caption y. Both are families of their own,
trained together or taken from released models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, cast

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import Array
from jax.core import Tracer

from t2i_jax.core.conditions import Batch
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.family import BaseFamily
from t2i_jax.core.fields import FREE, Size
from t2i_jax.core.specs import BatchSpec, FieldSpec, SampleSpec
from t2i_jax.core.types import Capabilities, Compute, Family, LossOutput, Objective
from t2i_jax.nn.layers import ModelState
from t2i_jax.noise.schedule import spread
from t2i_jax.sampling.inpainting import known_and_keep
from t2i_jax.sampling.options import DiffusionSampler, UnCLIPSampler
from t2i_jax.sampling.progress import Progress

PRIOR_NOISE, IMAGE_NOISE = 6, 7
"""What is folded into the key of an image for the noise of its prior, and of its embedding; a decoder folds in smaller
numbers."""
OWN = ("image_features", "image_noise", "image_noise_level")
"""Fields of the decoder's condition that are made here."""
CAPTIONS = ("features", "null_features")


@dataclasses.dataclass(frozen=True)
class UnCLIP(BaseFamily[UnCLIPSampler]):
    """A prior and a decoder: Gaussian diffusions of the embedding and of the image.

    The embedding of an image, `image_features`, is a condition of the decoder, and after `(z - mean) / std` the sample
    of the prior, an image of one position. A decoder may read it noised, with its noise level (`image_noise`).

    Both read the same `features` of a caption, or each its own: those of the prior then come first.
    """

    prior: Family
    decoder: Family
    candidates: Annotated[Size, FREE] = 1
    """Embeddings that the prior draws for each image, of which the one with the largest z . z_y is decoded, z_y being
    the caption's; 2 in the paper."""
    compute: Compute = Compute()
    """Of both parts, in place of their own."""
    sampling: Annotated[UnCLIPSampler, FREE] = UnCLIPSampler()
    """Default options of `sample`."""

    def __post_init__(self):
        super().__post_init__()
        for name, part in {"prior": self.prior, "decoder": self.decoder}.items():
            object.__setattr__(self, name, part.with_compute(self.compute))
        given, read = self.prior.sample_spec(), self.decoder.condition_spec().get("image_features")
        if read is None:
            raise ConfigError("decoder: its condition has no 'image_features', which the prior draws")
        if (given.grid, given.code.dtype, given.code.shape) != ((1, 1), "float32", read.shape):
            raise ConfigError(f"prior: draws {given.code} on a grid of {given.grid}; the decoder reads {read.shape}")

    @property
    def dim(self) -> int:
        """Size of an embedding."""
        return self.prior.sample_spec().code.shape[0]

    @property
    def capabilities(self) -> Capabilities:
        """Supported features beyond training."""
        prior, decoder = self.prior.capabilities, self.decoder.capabilities
        return Capabilities(
            family=True,
            unconditional=decoder.unconditional,
            guidance=True,
            inpaint=decoder.inpaint,
            init_image=decoder.init_image,
            remat=tuple(kind for kind in decoder.remat if kind in prior.remat),
        )

    def sample_spec(self) -> SampleSpec:
        """Shape and dtype of a sample."""
        return self.decoder.sample_spec()

    def condition_spec(self) -> BatchSpec:
        """Batch fields that `sample` reads: those of captions."""
        prior, decoder = self.prior.condition_spec(), self.decoder.condition_spec()
        both = {k: field for k, field in {**decoder, **prior}.items() if k not in OWN}
        if self._shares_captions:
            return both
        for name in CAPTIONS:
            several = [spec[name].shape for spec in (prior, decoder) if name in spec]
            shape = sum(n or 0 for n, _ in several), max((k or 0 for _, k in several), default=0)
            both |= {name: dataclasses.replace(both[name], shape=shape)} if several else {}
        return both

    def batch_spec(self) -> BatchSpec:
        """Fields of a training batch: those of the decoder, and what the prior reads of captions."""
        own = {k: field for k, field in self.decoder.batch_spec().items() if k not in OWN}
        return {**own, **self.condition_spec(), "image_features": FieldSpec((self.dim,), "float32")}

    @property
    def _shares_captions(self) -> bool:
        """Whether prior and decoder read the same features of captions."""
        return self.prior.condition_spec().get("features") == self.decoder.condition_spec().get("features")

    @property
    def noise_levels(self) -> int:
        """Number of noise levels of the embedding that the decoder reads; 0: it reads embeddings as they are."""
        level = self.decoder.condition_spec().get("image_noise_level")
        return 0 if level is None or level.high is None else level.high + 1

    def check(self, options: UnCLIPSampler) -> None:
        """Errors: ValueError for options that cannot be sampled with."""
        self.decoder.check(options)
        self.prior.check(self._of_prior(options))
        most = max(self.noise_levels - 1, 0)
        if not isinstance(options.image_noise, Tracer) and np.max(options.image_noise) > most:
            raise ValueError(f"image_noise {np.max(options.image_noise)}: this decoder has levels 0 to {most}")

    def loop_trips(self, options: UnCLIPSampler) -> int:
        """Number of solver steps of the longer loop."""
        return max(int(np.max(options.steps)), int(np.max(options.prior_steps)))

    def init(self, key: Array) -> UnCLIPModel:
        """A prior and a decoder with fresh parameters."""
        return UnCLIPModel(self, key)

    # -- training

    def objectives(self) -> dict[str, Objective]:
        """The loss of each part, which trains its parameters."""
        return {
            "prior": Objective(self._prior_loss, ("prior",)),
            "decoder": Objective(self._decoder_loss, ("decoder",)),
        }

    def loss(self, model: UnCLIPModel, batch: Batch, key: Array, train: bool = True) -> LossOutput:
        """The sum of both losses."""
        several = [o.loss(model, batch, key, jnp.zeros((), int), train) for o in self.objectives().values()]
        metrics = {k: v for output in several for k, v in output.metrics.items() if k != "loss"}
        return LossOutput(several[0].loss + several[1].loss, metrics)

    def _prior_loss(self, model: UnCLIPModel, batch: Batch, key: Array, step: Array, train: bool) -> LossOutput:
        z = (batch["image_features"] - model.mean[...]) / model.std[...]
        own = {k: v for k, v in self._split(batch)[0].items() if k != "image"} | {"codes": z[:, None, None]}
        (objective,) = self.prior.objectives().values()
        return objective.loss(model.prior, own, key, step, train)

    def _decoder_loss(self, model: UnCLIPModel, batch: Batch, key: Array, step: Array, train: bool) -> LossOutput:
        (objective,) = self.decoder.objectives().values()
        own, b = self._split(batch)[1], len(batch["image_features"])
        if self.noise_levels:
            keys = jax.random.split(jax.random.fold_in(key, IMAGE_NOISE))
            level = (self.noise_levels * spread(keys[0], b, train)).astype(jnp.int32)
            own |= {"image_noise": jax.random.normal(keys[1], (b, self.dim)), "image_noise_level": level}
        return objective.loss(model.decoder, own, key, step, train)

    def _split(self, batch: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        """The batch as prior and decoder read it."""
        prior, decoder = dict(batch), dict(batch)
        if self._shares_captions:
            return prior, decoder
        n, k = self.prior.condition_spec()["features"].shape
        width = self.decoder.condition_spec()["features"].shape[1]
        for name in CAPTIONS:
            if name in batch:
                prior[name], decoder[name] = batch[name][:, :n, :k], batch[name][:, n:, :width]
        decoder.pop("text_mask", None)  # that of the prior's tokens
        return prior, decoder

    # -- sampling

    def embeddings(
        self, model: UnCLIPModel, condition: Mapping[str, Array], keys: Array, options: UnCLIPSampler | None = None
    ) -> Array:
        """Embeddings of images (b, k) that the prior draws, one per row of the condition and per key of `keys` (b,)."""
        options, n = options or self.sampling, self.candidates
        own = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, PRIOR_NOISE), n))(keys)
        several = {k: jnp.repeat(v, n, 0) for k, v in self._split(condition)[0].items()}
        z = self.prior.sample(model.prior, several, own.reshape(-1), self._of_prior(options))
        z = rearrange(z, "(b n) 1 1 k -> b n k", n=n) * model.std[...] + model.mean[...]
        if n == 1:
            return z[:, 0]
        caption = condition["features"][:, 0, : z.shape[2]]
        best = jnp.argmax(jnp.einsum("bnk,bk->bn", z, caption), 1)
        return jnp.take_along_axis(z, best[:, None, None], 1)[:, 0]

    def sample(
        self,
        model: UnCLIPModel,
        condition: Mapping[str, Array],
        keys: Array,
        options: UnCLIPSampler | None = None,
        *,
        known: Array | None = None,
        keep: Array | None = None,
        guided: bool | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Images fp32 (b, i, j, c), one per row of the condition and per key of `keys` (b,).

        guided: whether the decoder computes its unconditional branch; the prior does if one was trained. known, keep,
        progress: of the decoder. All options are traced.
        """
        options = options or self.sampling
        self.check(options)
        if keep is not None:
            known, keep = known_and_keep(self.capabilities, self.sample_spec(), len(keys), known, keep)
        z = self.embeddings(model, condition, keys, options)
        edit = {} if known is None and keep is None else {"known": known, "keep": keep}
        whole = self._split(condition)[1] | {"image_features": z}
        if self.noise_levels:
            draw = lambda key: jax.random.normal(jax.random.fold_in(key, IMAGE_NOISE), (self.dim,))
            level = jnp.broadcast_to(jnp.asarray(options.image_noise, jnp.int32), keys.shape)
            whole |= {"image_noise": jax.vmap(draw)(keys), "image_noise_level": level}
        return self.decoder.sample(model.decoder, whole, keys, options, guided=guided, progress=progress, **edit)

    def _of_prior(self, options: UnCLIPSampler) -> DiffusionSampler:
        """The options of the prior: its own, but for those that are given."""
        own = cast(DiffusionSampler, self.prior.options())
        return dataclasses.replace(own, steps=options.prior_steps, guidance=options.prior_guidance)


class UnCLIPModel(nnx.Module):
    """The parameters of an `UnCLIP`, and mean and standard deviation of embeddings."""

    def __init__(self, config: UnCLIP, key: Array):
        keys = jax.random.split(key)
        self.prior, self.decoder = config.prior.init(keys[0]), config.decoder.init(keys[1])
        self.mean = ModelState(jnp.zeros(config.dim), axes=(None,))
        self.std = ModelState(jnp.ones(config.dim), axes=(None,))
