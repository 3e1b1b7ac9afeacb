"""unCLIP: a prior draws the embedding of an image from a caption, a decoder the image from both (Ramesh et al. 2022).

P(x | y) = P(x | z, y) P(z | y) for an image x, its CLIP embedding z and a caption y. Both are families of their own,
trained together or taken from released models. The prior is a diffusion of the embedding, or draws codes of its
principal components one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import Array
from jax.core import Tracer

from t2i_jax.codecs.principal import Moments, PrincipalCodes
from t2i_jax.core.conditions import Batch
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.family import BaseFamily
from t2i_jax.core.fields import FREE, Count, Share, Size
from t2i_jax.core.specs import BatchSpec, CodeSpec, FieldSpec, SampleSpec
from t2i_jax.core.types import Capabilities, Compute, Family, InTurn, LossOutput, Objective, Trips
from t2i_jax.networks.condition import dropped_rows
from t2i_jax.nn.layers import ModelState, replace
from t2i_jax.noise.schedule import spread
from t2i_jax.sampling.inpainting import known_and_keep
from t2i_jax.sampling.options import ARSampler, DiffusionSampler, GuidedOptions, UnCLIPSampler
from t2i_jax.sampling.progress import Progress

PRIOR_NOISE, IMAGE_NOISE, SIMILARITY, CAPTION = 6, 7, 8, 9
"""What is folded into the key of an image for the noise of its prior, and of its embedding, and for how similar it is
to its caption; and into that of a step for which captions are left out. A decoder folds in smaller numbers."""
OWN = ("image_features", "image_noise", "image_noise_level", "similarity")
"""Fields of the conditions of both parts that are made here."""
CAPTIONS = ("features", "null_features")
A = TypeVar("A", Array, np.ndarray)


@dataclasses.dataclass(frozen=True)
class UnCLIP(BaseFamily[UnCLIPSampler]):
    """A prior of the embedding of an image, and a decoder of both, a Gaussian diffusion.

    The embedding, `image_features`, is a condition of the decoder. The prior is a diffusion, whose sample, an image of
    one position, is (z - mean) / std; or with `codes` it draws a row of codes of the embedding's principal components,
    as an `AR` does, and may read how similar caption and image are (`networks.unclip.Similarity`). A decoder may read
    the embedding noised, with its noise level (`image_noise`).

    Both read the same `features` of a caption, or each its own: those of the prior then come first.
    """

    prior: Family | None
    """None: embeddings are those of given images, never drawn"""
    decoder: Family
    candidates: Annotated[Size, FREE] = 1
    """Embeddings that the prior draws for each image, of which the one with the largest z . z_y is decoded, z_y being
    the caption's; 2 in the paper."""
    compute: Compute = Compute()
    """Of both parts, in place of their own."""
    sampling: Annotated[UnCLIPSampler, FREE] = UnCLIPSampler()
    """Default options of `sample`."""
    codes: PrincipalCodes | None = None
    """of embeddings, which the prior draws; None: it draws embeddings themselves"""
    fit_examples: Count = 0
    """Examples whose embeddings give mean and standard deviation, or principal axes, before the first step; 0: for a
    prior of embeddings themselves, which stay as they are."""
    caption_dropout: Share = 0.5
    """Share of the decoder's training examples whose caption alone is left out, so that an embedding without one draws
    variations; both are left out as its own conditioning says. It needs the mask of captions (`ImageAndCaption`)."""

    def __post_init__(self):
        super().__post_init__()
        for name, part in {"prior": self.prior, "decoder": self.decoder}.items():
            if part is not None:
                object.__setattr__(self, name, part.with_compute(self.compute))
        if "image_features" not in self.decoder.condition_spec():
            raise ConfigError("decoder: its condition has no 'image_features', which the prior draws")
        if self.prior is None:
            if self.codes is not None or self.fit_examples or self.candidates > 1:
                raise ConfigError("codes, fit_examples, candidates: they are a prior's, and there is none")
            return
        given, wanted = self.prior.sample_spec(), SampleSpec((1, 1), CodeSpec("float32", (self.dim,)))
        if self.codes is not None:
            wanted = SampleSpec((1, self.codes.kept), CodeSpec("int32", sizes=(self.codes.buckets,)))
            if not self.fit_examples:
                raise ConfigError("fit_examples 0: principal axes are computed from examples")
        if given != wanted:
            said = "{} on a grid of {}"
            raise ConfigError(
                f"prior: draws {said.format(given.code, given.grid)}; the decoder needs "
                f"{said.format(wanted.code, wanted.grid)}"
            )

    @property
    def dim(self) -> int:
        """Size of an embedding."""
        return cast(int, self.decoder.condition_spec()["image_features"].shape[0])

    @property
    def capabilities(self) -> Capabilities:
        """Supported features beyond training."""
        decoder = self.decoder.capabilities
        prior = decoder if self.prior is None else self.prior.capabilities
        return Capabilities(
            family=True,
            unconditional=decoder.unconditional,
            guidance=True,
            inpaint=decoder.inpaint,
            init_image=decoder.init_image,
            image_embedding=True,
            fitted=self.fit_examples > 0,
            remat=tuple(kind for kind in decoder.remat if kind in prior.remat),
        )

    def sample_spec(self) -> SampleSpec:
        """Shape and dtype of a sample."""
        return self.decoder.sample_spec()

    def condition_spec(self) -> BatchSpec:
        """Batch fields that `sample` reads: those of captions; without a prior also the embeddings."""
        prior, decoder = self._read_by_prior, self.decoder.condition_spec()
        if self.prior is None:
            return {k: field for k, field in decoder.items() if k not in OWN or k == "image_features"}
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
    def _read_by_prior(self) -> BatchSpec:
        """The prior's condition, if there is a prior."""
        return {} if self.prior is None else self.prior.condition_spec()

    @property
    def _shares_captions(self) -> bool:
        """Whether prior and decoder read the same features of captions, or there is no prior."""
        return self.prior is None or self._read_by_prior.get("features") == self.decoder.condition_spec().get(
            "features"
        )

    @property
    def similarities(self) -> int:
        """Number of buckets of how similar caption and image are, which the prior reads; 0: it does not."""
        field = self._read_by_prior.get("similarity")
        return 0 if field is None or field.high is None else field.high + 1

    @property
    def noise_levels(self) -> int:
        """Number of noise levels of the embedding that the decoder reads; 0: it reads embeddings as they are."""
        level = self.decoder.condition_spec().get("image_noise_level")
        return 0 if level is None or level.high is None else level.high + 1

    def check(self, options: UnCLIPSampler) -> None:
        """Errors: ValueError for options that cannot be sampled with."""
        self.decoder.check(options)
        if self.prior is not None:
            self.prior.check(self._of_prior(options))
        if self.codes is not None:
            options.check_default("this prior draws its codes one by one", "prior_steps")
        if not self.similarities:
            options.check_default("this prior does not read how similar caption and image are", "prior_similarity")
        most = max(self.noise_levels - 1, 0)
        if not isinstance(options.image_noise, Tracer) and np.max(options.image_noise) > most:
            raise ValueError(f"image_noise {np.max(options.image_noise)}: this decoder has levels 0 to {most}")

    def loop_trips(self, options: UnCLIPSampler) -> Trips:
        """Numbers of solver steps of the prior and of the decoder."""
        decoder = self.decoder.loop_trips(options)
        if self.prior is None or self.codes is not None:  # codes are drawn in loops of static length
            return decoder
        return InTurn((self.prior.loop_trips(self._of_prior(options)), decoder))

    def init(self, key: Array) -> UnCLIPModel:
        """A prior and a decoder with fresh parameters."""
        return UnCLIPModel(self, key)

    # -- training

    def objectives(self) -> dict[str, Objective]:
        """The loss of each part, which trains its parameters."""
        decoder = {"decoder": Objective(self._decoder_loss, ("decoder",))}
        return decoder if self.prior is None else {"prior": Objective(self._prior_loss, ("prior",)), **decoder}

    def loss(self, model: UnCLIPModel, batch: Batch, key: Array, train: bool = True) -> LossOutput:
        """The sum of the losses of all parts."""
        several = [o.loss(model, batch, key, jnp.zeros((), int), train) for o in self.objectives().values()]
        metrics = {k: v for output in several for k, v in output.metrics.items() if k != "loss"}
        return LossOutput(jnp.stack([output.loss for output in several]).sum(), metrics)

    def _prior_loss(self, model: UnCLIPModel, batch: Batch, key: Array, step: Array, train: bool) -> LossOutput:
        z = batch["image_features"]
        own = {k: v for k, v in self._split(batch)[0].items() if k != "image"}
        own |= {"codes": model.encoded(z)}
        if self.similarities:
            own["similarity"] = model.bucket_of(jnp.sum(z * self._caption(batch), 1), self.similarities)
        (objective,) = self._drawn.objectives().values()
        return objective.loss(model.prior, own, key, step, train)

    def _decoder_loss(self, model: UnCLIPModel, batch: Batch, key: Array, step: Array, train: bool) -> LossOutput:
        (objective,) = self.decoder.objectives().values()
        own, b = self._split(batch)[1], len(batch["image_features"])
        if self.noise_levels:
            keys = jax.random.split(jax.random.fold_in(key, IMAGE_NOISE))
            level = (self.noise_levels * spread(keys[0], b, train)).astype(jnp.int32)
            own |= {"image_noise": jax.random.normal(keys[1], (b, self.dim)), "image_noise_level": level}
        if "text_mask" in own:
            without = dropped_rows(jax.random.fold_in(key, CAPTION), self.caption_dropout, b, train)
            own["text_mask"] = own["text_mask"] & ~without[:, None]
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

    @property
    def fit_fields(self) -> tuple[str, ...]:
        """Fields of a training batch that statistics of embeddings are computed from."""
        return ("image_features", "features")

    def fitted(self, model: UnCLIPModel, batches: Iterable[Mapping[str, np.ndarray]]) -> UnCLIPModel:
        """The model with statistics of embeddings, and of their products with those of captions, of these batches."""
        products: list[np.ndarray] = []

        def embeddings() -> Iterator[np.ndarray]:
            for batch in batches:
                z = batch["image_features"]
                if self.similarities:
                    products.append(np.sum(z * self._caption(batch), 1))
                yield z

        moments = Moments.of(embeddings())
        if self.similarities:
            several = np.concatenate(products).astype(np.float64)
            spread_of = jnp.asarray([several.mean(), max(several.std(), 1e-6)], jnp.float32)
            model = replace(model, similarity=spread_of)
        if model.axes is not None:
            return replace(model, axes=model.axes.fitted(moments))
        std = np.sqrt(np.maximum(np.diag(moments.covariance), 1e-12))
        return replace(model, mean=jnp.asarray(moments.mean, jnp.float32), std=jnp.asarray(std, jnp.float32))

    # -- sampling

    @property
    def _drawn(self) -> Family:
        """The prior. Errors: `ConfigError` if there is none."""
        if self.prior is None:
            raise ConfigError("this model has no prior, which draws embeddings: give it an image (--vary IMAGE)")
        return self.prior

    def _caption(self, batch: Mapping[str, A]) -> A:
        """Embeddings (b, k) of captions, the first vectors of their features."""
        return batch["features"][:, 0, : self.dim]

    def embeddings(
        self, model: UnCLIPModel, condition: Mapping[str, Array], keys: Array, options: UnCLIPSampler | None = None
    ) -> Array:
        """Embeddings of images (b, k) that the prior draws, one per row of the condition and per key of `keys` (b,)."""
        options, n = options or self.sampling, self.candidates
        own = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, PRIOR_NOISE), n))(keys).reshape(-1)
        several = {k: jnp.repeat(v, n, 0) for k, v in self._split(condition)[0].items()}
        if self.similarities:
            least = jnp.repeat(jnp.broadcast_to(jnp.asarray(options.prior_similarity, jnp.float32), keys.shape), n)
            u = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, SIMILARITY)))(own)
            bucket = ((least + (1 - least) * u) * self.similarities).astype(jnp.int32)
            several["similarity"] = jnp.minimum(bucket, self.similarities - 1)  # a share may round to 1
        scale = jnp.repeat(jnp.broadcast_to(jnp.asarray(options.prior_guidance, jnp.float32), keys.shape), n)
        chosen = self._of_prior(dataclasses.replace(options, prior_guidance=scale))
        z = model.decoded(self._drawn.sample(model.prior, several, own, chosen))
        z = rearrange(z, "(b n) k -> b n k", n=n)
        if n == 1:
            return z[:, 0]
        best = jnp.argmax(jnp.einsum("bnk,bk->bn", z, self._caption(condition)), 1)
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
        image_features: Array | None = None,
        guided: bool | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Images fp32 (b, i, j, c), one per row of the condition and per key of `keys` (b,).

        image_features: embeddings (b, k) in place of those that the prior draws. guided: whether the decoder computes
        its unconditional branch; the prior does if one was trained. known, keep, progress: of the decoder. All options
        are traced.
        """
        options = options or self.sampling
        self.check(options)
        if keep is not None:
            known, keep = known_and_keep(self.capabilities, self.sample_spec(), len(keys), known, keep)
        given = condition.get("image_features") if image_features is None and self.prior is None else image_features
        z = self.embeddings(model, condition, keys, options) if given is None else given
        edit = {} if known is None and keep is None else {"known": known, "keep": keep}
        whole = self._split(condition)[1] | {"image_features": z}
        if self.noise_levels:
            draw = lambda key: jax.random.normal(jax.random.fold_in(key, IMAGE_NOISE), (self.dim,))
            level = jnp.broadcast_to(jnp.asarray(options.image_noise, jnp.int32), keys.shape)
            whole |= {"image_noise": jax.vmap(draw)(keys), "image_noise_level": level}
        return self.decoder.sample(model.decoder, whole, keys, options, guided=guided, progress=progress, **edit)

    def _of_prior(self, options: UnCLIPSampler) -> GuidedOptions:
        """The options of the prior: its own, but for those that are given."""
        own = self._drawn.options()
        if self.codes is not None:
            return dataclasses.replace(cast(ARSampler, own), guidance=options.prior_guidance)
        return dataclasses.replace(
            cast(DiffusionSampler, own), steps=options.prior_steps, guidance=options.prior_guidance
        )


class UnCLIPModel(nnx.Module):
    """The parameters of an `UnCLIP`, and statistics of embeddings: mean and standard deviation, or principal axes; and
    mean and standard deviation of their products with those of captions."""

    def __init__(self, config: UnCLIP, key: Array):
        keys, plain = jax.random.split(key), config.prior is not None and config.codes is None
        self.prior = None if config.prior is None else config.prior.init(keys[0])
        self.decoder = config.decoder.init(keys[1])
        self.mean = ModelState(jnp.zeros(config.dim), axes=(None,)) if plain else None
        self.std = ModelState(jnp.ones(config.dim), axes=(None,)) if plain else None
        self.axes = None if config.codes is None else config.codes.init(config.dim)
        self.similarity = ModelState(jnp.asarray([0.0, 1.0]), axes=(None,)) if config.similarities else None

    def encoded(self, z: Array) -> Array:
        """Embeddings (b, k) as the prior draws them: (b, 1, 1, k), or codes int32 (b, 1, d)."""
        if self.axes is not None:
            return self.axes.encode(z)[:, None]
        mean, std = self._statistics
        return ((z - mean) / std)[:, None, None]

    def decoded(self, sample: Array) -> Array:
        """Embeddings (b, k) of samples of the prior."""
        if self.axes is not None:
            return self.axes.decode(sample[:, 0])
        mean, std = self._statistics
        return sample[:, 0, 0] * std + mean

    def bucket_of(self, product: Array, buckets: int) -> Array:
        """The bucket int32 (b,) of products of embeddings (b,): all are equally likely where products are Gaussian, so
        that a share of the largest products is that share of the buckets."""
        assert self.similarity is not None
        mean, std = self.similarity[...]
        share = jax.scipy.stats.norm.cdf((product - mean) / std)
        return jnp.clip(share * buckets, 0, buckets - 1).astype(jnp.int32)

    @property
    def _statistics(self) -> tuple[Array, Array]:
        assert self.mean is not None and self.std is not None
        return self.mean[...], self.std[...]
