"""One-stage GANs: DF-GAN, SSA-GAN."""

from __future__ import annotations

import re
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jax.typing import ArrayLike

from t2i_jax.convert import convert, restore
from t2i_jax.core.family import with_fields
from t2i_jax.models.gan import GAN, GANNetwork, GeneratedImages
from t2i_jax.networks.damsm import ImageEncoder
from t2i_jax.nn.adversarial import gradient_penalty, input_gradients
from t2i_jax.sampling.options import GANSampler
from tests.published.parity import Oracle
from tests.published.systems.codecs import nchw, nhwc

AT = jax.random.key(0), jnp.int32(0)


def dfgan(oracle: Oracle) -> dict[str, Any]:
    meta, inputs = oracle.config, oracle.inputs
    text = {name.partition(".")[2]: tensor for name, tensor in oracle.tensors.items() if name.startswith("text_")}
    gan = {name: tensor for name, tensor in oracle.tensors.items() if not name.startswith("text_")}
    ids, longest = jnp.asarray(inputs["captions"]), int(inputs["cap_lens"].max())
    encoder = convert("damsm", text, length=ids.shape[1])[1].text
    words, sentence = encoder(ids, jnp.arange(ids.shape[1]) < inputs["cap_lens"][:, None])
    config, model = convert("dfgan", gan, words=longest)
    assert config.network.size == (meta["imsize"],) * 2 and config.network.noise == meta["z_dim"]
    words = rearrange(words[:, :longest], "b s k -> b k s")
    batch, z = _batch(nhwc(inputs["real"]), sentence, words), jnp.asarray(inputs["noise"])

    @jax.jit
    def play(model: GANNetwork) -> tuple[dict[str, Any], GANNetwork, GANNetwork]:
        fake = model.generator(z, sentence, True)[0].images
        outcome, by_judge = _game(config.discriminator_loss, model, batch, fake)
        paint = lambda m: m.generator(z, sentence, True)[0].images
        fooled, by_generator = jax.value_and_grad(lambda m: _of(config.generator_loss, m, batch, paint(m)).loss)(model)
        judge = model.judge
        features = judge.features(batch["image"])
        ours = {
            "word_emb": words,
            "sent_emb": sentence,
            "fake": nchw(fake),
            "real_features": nchw(features),
            "errG": fooled,
        }
        ours |= {"pred_real": _map(judge.logits(features, sentence))}
        ours |= {"pred_fake": _map(judge.logits(judge.features(fake), sentence))}
        return ours | _terms(outcome) | {"errD": outcome["loss"]}, by_judge, by_generator

    ours, by_judge, by_generator = play(model)
    ours |= _gradients("dfgan", config, by_judge, "grad.netD.") | _gradients(
        "dfgan", config, by_generator, "grad.netG."
    )
    # The published draw is SciPy's; ours is of the same law.
    seed = int(re.sub(r"\D", "", next(name for name in oracle.outputs if name.startswith("truncated_noise"))))
    name, law = f"truncated_noise_seed{seed}", config.sampling
    ours[name] = _truncated(seed, oracle.outputs[name].shape, law)
    return ours


def ssagan(oracle: Oracle) -> dict[str, Any]:
    meta, inputs = oracle.config, oracle.inputs
    config, model = convert("ssagan", oracle.tensors, words=inputs["word_emb"].shape[2])
    side = meta["imsize"]
    assert config.network.size == (side, side) and config.network.block.mask_width == meta["mask_hidden"]
    low = nhwc(inputs["real_low"])
    real = jnp.tanh(repeat(low, "b i j c -> b (i p) (j q) c", p=side // low.shape[1], q=side // low.shape[2]))
    batch, z = _batch(real, inputs["sent_emb"], inputs["word_emb"]), jnp.asarray(inputs["noise"])
    sentence = batch["features"][:, 0]

    which = [
        oracle.read_note("train_running_mean", pattern, n)
        for pattern, n in ((r"block(\d+)", "2"), (r"affine(\d)", "0"))
    ]

    @jax.jit
    def play(model: GANNetwork) -> tuple[Any, ...]:
        judge, generator = model.judge, model.generator
        made, _ = generator(z, sentence, False)
        ours = {f"mask{m.shape[1]}": nchw(m) for m in made.masks} | {"fake": nchw(made.images)}
        ours |= _blocks(config, generator, z, sentence, made.masks)
        features = judge.features(real)
        ours |= {"real_features": nchw(features), "pred_real": _map(judge.logits(features, sentence))}
        outcome, by_judge = _game(config.discriminator_loss, model, batch, made.images)
        ours |= _terms(outcome) | {"errD": outcome["loss"]}
        features, back = jax.vjp(judge.features, real)
        by_features, by_sentence = input_gradients(judge.logits, features, sentence)[1]
        ours["ma_gp_norms"] = gradient_penalty((*back(by_features), by_sentence), 1.0)
        penalty, by_penalty = jax.value_and_grad(lambda m: config.penalty_loss(m, batch, *AT, True).loss)(model)

        def fool(model: GANNetwork) -> tuple[jax.Array, Any]:
            painting, after = model.generator(z, sentence, True)
            return _of(config.generator_loss, model, batch, painting.images).loss, (painting, after)

        (loss, (painting, after)), by_generator = jax.value_and_grad(fool, has_aux=True)(model)
        of_block = after.blocks[int(which[0])]
        statistics = (of_block.norm1 if which[1] == "0" else of_block.norm2).norm
        ours |= {"ma_gp": penalty, "errG": loss, "fake_train": nchw(painting.images)}
        ours |= {f"mask{side}_train": nchw(painting.masks[-1])}
        ours |= {"train_running_mean": statistics.mean[...], "train_running_var": statistics.var[...]}
        return ours, by_judge, by_generator, by_penalty

    ours, *slopes = play(model)
    for gradients, prefix in zip(slopes, ("grad.netD.", "grad.netG.", "grad_ma_gp.netD."), strict=True):
        ours |= _gradients("ssagan", config, gradients, prefix)

    @jax.jit
    def match(regions: jax.Array, code: jax.Array) -> jax.Array:
        # The classes of images are a field of a batch with `matching`.
        matching = with_fields(config, matching="its encoder", gammas=(meta["GAMMA1"], meta["GAMMA2"], meta["GAMMA3"]))
        shown = cast(ImageEncoder, lambda images: (regions, code))
        classes = {"label": jnp.asarray(inputs["class_ids"])}
        return meta["LAMBDA"] * sum(matching.matched(shown, model, batch | classes, real).values())

    regions = rearrange(jnp.asarray(inputs["region_features"]), "b k i j -> b (i j) k")
    ours["damsm"], by_images = jax.value_and_grad(match, (0, 1))(regions, jnp.asarray(inputs["image_code"]))
    rows, columns = inputs["region_features"].shape[2:]
    by_regions = rearrange(by_images[0], "b (i j) k -> b k i j", i=rows, j=columns)
    for name in oracle.outputs:  # some with every nth row and column alone
        stem, _, step = name.rpartition("_s")
        if stem in ours and step.isdecimal():
            ours[name] = ours[stem][..., :: int(step), :: int(step)]
    return ours | {"grad.region_features": by_regions, "grad.image_code": by_images[1]}


def _batch(images: jax.Array, sentence: ArrayLike, words: ArrayLike) -> dict[str, jax.Array]:
    """A batch of images, and the features of captions: sentences (b, k), and words (b, k, s) that are 0 at the end."""
    words = rearrange(jnp.asarray(words), "b k s -> b s k")
    features = jnp.concatenate([jnp.asarray(sentence)[:, None], words], 1)
    return {"image": images, "features": features, "text_mask": jnp.any(words != 0, -1)}


def _of(loss: Any, model: GANNetwork, batch: dict[str, jax.Array], fake: jax.Array) -> Any:
    return loss(model, batch | {"outputs": GeneratedImages(fake, model.generator)}, *AT, True)


def _game(loss: Any, model: GANNetwork, batch: dict[str, jax.Array], fake: jax.Array) -> tuple[Any, GANNetwork]:
    """The metrics of a loss of the discriminator, and its gradients."""

    def outcome(model: GANNetwork) -> tuple[jax.Array, Any]:
        output = _of(loss, model, batch, fake)
        return output.loss, output.metrics

    (_, metrics), slopes = jax.value_and_grad(outcome, has_aux=True)(model)
    return metrics, slopes


def _terms(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    names = {"errD_real": "real", "errD_mis": "mismatched", "errD_fake": "fake", "ma_gp": "penalty"}
    return {theirs: metrics[ours] for theirs, ours in names.items()}


def _map(logits: jax.Array) -> jax.Array:
    return logits[:, None, None, None]


def _gradients(format: str, config: GAN, slopes: GANNetwork, prefix: str) -> dict[str, Any]:
    """The gradients of a loss by the parameters that it trains: `grad.netD.` is of the discriminator, its head
    included."""
    kind, player, _ = prefix.split(".")
    named = restore(format, config, slopes)
    return {f"{kind}.{k}": v for k, v in named.items() if k.startswith("netG.") == (player == "netG")}


def _blocks(config: GAN, generator: Any, z: jax.Array, sentence: jax.Array, masks: Any) -> dict[str, jax.Array]:
    """Features inside of the generator: of its first block, of the second one's first norm, of the last block."""
    rows, columns = config.network.start
    x = rearrange(generator.into(z), "b (i j c) -> b i j c", i=rows, j=columns)
    ours: dict[str, jax.Array] = {}
    for n, (block, mask) in enumerate(zip(generator.blocks, masks, strict=True)):
        x = repeat(x, "b i j c -> b (i p) (j q) c", p=min(n + 1, 2), q=min(n + 1, 2))
        # The published program's ReLU works in place, on the array that was kept.
        ours[f"block{n}_affine0"] = nchw(jax.nn.relu(block.norm1(x, mask, sentence, False)[0]))
        x, logits, _ = block(x, mask, sentence, False)
        ours[f"block{n}"] = nchw(x)
        ours |= {} if logits is None else {f"block{n}_mask_logits": nchw(logits)}
    return ours


def _truncated(seed: int, shape: tuple[int, ...], law: GANSampler) -> np.ndarray:
    """Noise of the law of `law` as SciPy draws it with NumPy's generator of that seed."""
    from scipy.stats import truncnorm

    draw = truncnorm.rvs(-law.truncation, law.truncation, size=shape, random_state=np.random.RandomState(seed))
    return (law.temperature * draw).astype(np.float32)


SYSTEMS = {"dfgan": dfgan, "ssagan": ssagan}
