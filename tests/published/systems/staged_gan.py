"""GANs in stages: StackGAN, StackGAN++ with and without captions, AttnGAN, DM-GAN."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce, repeat

from t2i_jax.convert import convert, restore
from t2i_jax.models.staged_gan import GeneratedStages, color_differences, colors
from t2i_jax.networks.condition import Context
from t2i_jax.nn.adversarial import gaussian_kl
from t2i_jax.nn.layers import replace
from t2i_jax.nn.matching import matching_losses
from tests.published.parity import Oracle
from tests.published.systems.codecs import nchw, nhwc

KEY, STEP = jax.random.key(0), jnp.int32(0)
MATCHING = {
    "w_loss0": "words/image_to_text",
    "w_loss1": "words/text_to_image",
    "s_loss0": "sentence/image_to_text",
    "s_loss1": "sentence/text_to_image",
}


def strided(ours: dict[str, Any], oracle: Oracle) -> dict[str, Any]:
    """The arrays, and every n-th row and column of those that the folder has under NAME_sn."""
    for name in oracle.outputs:
        if (found := re.fullmatch(r"(.*)_s(\d)", name)) and found[1] in ours:
            n = int(found[2])
            ours[name] = np.asarray(ours[found[1]])[..., ::n, ::n]
    return ours


def images(painted: GeneratedStages, suffix: str = "") -> dict[str, Any]:
    return {f"fake{stage.image.shape[1]}{suffix}": nchw(stage.image) for stage in painted.stages}


def enlarged(low: np.ndarray, size: int) -> jax.Array:
    """tanh of a small image, enlarged to a size by repetition: in place of a real image."""
    times = size // low.shape[2]
    return jnp.tanh(repeat(nhwc(low), "b i j c -> b (i p) (j q) c", p=times, q=times))


def wanted(slopes: dict[str, Any], oracle: Oracle) -> dict[str, Any]:
    return {f"grad.{k}": v for k, v in slopes.items() if f"grad.{k}" in oracle.outputs}


def running(name: str, config: Any, model: Any, painted: GeneratedStages, oracle: Oracle) -> dict[str, Any]:
    """The generator's running statistics after one forward pass: `train_running_*`, of the layer that the line about
    the array names, or of the one before."""
    tensors = restore(name, config, replace(model, generator=painted.generator))
    found, layer = {}, ""
    for array in sorted(oracle.outputs):
        if kind := re.match(r"train_(running_mean|running_var)", array):
            layer = oracle.read_note(array, r"(netG(?:\.\w+)+)", layer)
            found[array] = tensors[f"{layer}.{kind[1]}"][: len(oracle.outputs[array])]
    return found


def sentences_and_words(oracle: Oracle) -> tuple[Context, Context]:
    """Sentence, words and their mask; and the same with all words visible."""
    inputs = oracle.inputs
    words = rearrange(jnp.asarray(inputs["word_emb"]), "b k s -> b s k")
    context = Context(jnp.asarray(inputs["sent_emb"]), words, ~jnp.asarray(inputs["pad_mask"]))
    return context, context._replace(mask=jnp.ones_like(context.mask))


def painter(oracle: Oracle) -> Callable[..., GeneratedStages]:
    """(model, context, train, rows) -> the images of the generator from the folder's noise."""
    noise, eps = (jnp.asarray(oracle.inputs[k]) for k in ("noise", "ca_noise"))

    def paint(model: Any, context: Context, train: bool = False, rows: int | None = None) -> GeneratedStages:
        few = jax.tree.map(lambda x: x[:rows], context)
        return model.generator(few, noise[:rows], eps[:rows], train)

    return paint


def matched(oracle: Oracle, context: Context) -> dict[str, Any]:
    """The four losses of given regions, and their gradients."""
    inputs = oracle.inputs
    regions = rearrange(jnp.asarray(inputs["region_features"]), "b k i j -> b (i j) k")
    gammas = [float(oracle.config.get(f"GAMMA{n}", default)) for n, default in ((1, 4.0), (2, 5.0), (3, 10.0))]

    def losses(regions, words, sentence):
        found = matching_losses(
            words, context.mask, sentence, regions, inputs["image_code"], inputs["class_ids"], *gammas
        )
        return sum(found.values()), found

    run = jax.jit(jax.value_and_grad(losses, (0, 1, 2), has_aux=True))
    (_, found), slopes = run(regions, context.tokens, context.pooled)
    side = inputs["region_features"].shape[2]
    ours = {ours: found[name] for ours, name in MATCHING.items()}
    ours["grad.region_features"] = rearrange(slopes[0], "b (i j) k -> b k i j", i=side)
    return ours | {"grad.word_emb": rearrange(slopes[1], "b s k -> b k s"), "grad.sent_emb": slopes[2]}


def codes(painted: GeneratedStages) -> dict[str, Any]:
    code = painted.stages[0].code
    return {
        "mu": code.mean,
        "logvar": code.log_variance,
        "kl_loss": gaussian_kl(code.mean, code.log_variance).mean(),
    }


def opinions(judge: Any, x: Any, condition: Any, train: bool = False):
    """Features, and the probabilities with the condition and alone, of one call; and the renewed discriminator."""
    features, judge = judge.features(x, train)
    alone = None if judge.alone is None else jax.nn.sigmoid(judge.judges_alone(features))
    if condition is None:
        return (nchw(features), None, alone), judge
    logits, judge = judge.matches(features, condition, train)
    return (nchw(features), jax.nn.sigmoid(logits), alone), judge


def attngan(oracle: Oracle) -> dict[str, Any]:
    context, unmasked = sentences_and_words(oracle)
    words = oracle.inputs["word_emb"].shape[2]
    config, model = convert("attngan", oracle.tensors, words=words, published_masks=True)
    paint = painter(oracle)

    @jax.jit
    def run(model):
        painted = paint(model, context)
        ours = images(painted) | codes(painted)
        for n, stage in enumerate(painted.stages[1:]):
            ours[f"att{n + 1}"] = rearrange(stage.seen["attention"], "b i j s -> b s i j")
        ours |= images(paint(model, context, rows=1), "_batch1") | images(paint(model, unmasked), "_nomask")
        for n, (judge, stage) in enumerate(zip(model.discriminators, painted.stages, strict=True)):
            seen = opinions(judge, stage.image, context.pooled)[0]
            ours |= dict(zip((f"D{n}_features", f"D{n}_cond", f"D{n}_uncond"), seen, strict=True))
            real = jnp.tanh(0.5 * stage.image)
            means, _ = config.judge(judge, real, stage.image, context.pooled, train=False)
            ours[f"D{n}_loss"] = config.weighed(means, n)[0]
        return ours

    return run(model) | matched(oracle, context)


def dmgan(oracle: Oracle) -> dict[str, Any]:
    inputs = oracle.inputs
    context, unmasked = sentences_and_words(oracle)
    hints = {"words": inputs["word_emb"].shape[2], "published_masks": True, "matching": "the stub"}
    gammas = tuple(float(oracle.config[f"GAMMA{n}"]) for n in (1, 2, 3))
    config, model = convert(
        "dmgan", oracle.tensors, **hints, matching_weight=float(oracle.config["LAMBDA"]), gammas=gammas
    )
    paint = painter(oracle)
    stub = {k.removeprefix("stub_image_encoder."): v for k, v in oracle.tensors.items() if k.startswith("stub_")}

    def encoder(x):
        pooled = reduce(x, "b (i p) (j q) c -> b (i j) c", "mean", p=16, q=16)
        regions = pooled @ stub["region.weight"].T + stub["region.bias"]
        return regions, x.mean((1, 2)) @ stub["code.weight"].T + stub["code.bias"]

    @jax.jit
    def paintings(model):
        painted = paint(model, context)
        ours = images(painted) | codes(painted)
        for n, stage in enumerate(painted.stages[1:]):
            seen = stage.seen
            ours[f"att{n + 1}"] = attention = rearrange(seen["attention"], "b i j s -> b s i j")
            padding = (attention * ~context.mask[:, :, None, None]).sum(1).mean((1, 2))
            ours[f"att{n + 1}_padding_mass"] = padding
            ours[f"stage{n + 2}_writing_gate"] = rearrange(seen["writing_gate"], "b s 1 -> b 1 s")
            ours[f"stage{n + 2}_response_gate"] = nchw(seen["response_gate"])
            ours |= {f"stage{n + 2}_{k}": rearrange(seen[k], "b s w -> b w s") for k in ("key", "value")}
        ours |= images(paint(model, context, rows=1), "_batch1") | images(paint(model, unmasked), "_nomask")
        return ours

    @jax.jit
    def judgements(model):
        painted, ours, slopes = paint(model, context), {}, []
        for n, (judge, stage) in enumerate(zip(model.discriminators, painted.stages, strict=True)):
            size, c = stage.image.shape[1], context.pooled
            x = enlarged(inputs[f"real{size}_low"], size)
            seen, once = opinions(judge, x, c)
            ours |= dict(zip((f"D{n}_features", f"D{n}_cond", f"D{n}_uncond"), seen, strict=True))
            ours[f"D{n}_cond_second_call"] = opinions(once, x, c)[0][1]
            means, after = config.judge(judge, x, stage.image, c, train=True)
            ours[f"D{n}_loss"] = config.weighed(means, n)[0]
            ours |= {f"D{n}_u_after": after.trunk[0].conv.u[...], f"D{n}_joint_u_after": after.joint.conv.u[...]}

            def of_real(judge, x=x, c=c):
                features, judge = judge.features(x, True)
                logits, judge = judge.matches(features, c, True)
                terms = jax.nn.softplus(-logits), jax.nn.softplus(-judge.judges_alone(features))
                return terms[0].mean() + terms[1].mean()

            ours[f"D{n}_real_loss"], slope = jax.value_and_grad(of_real)(judge)
            slopes.append(slope)
        return ours, slopes

    @jax.jit
    def trained(model):
        def loss(model):
            painted = paint(model, context, train=True)
            batch = {"image": jnp.zeros((len(context.mask), 1)), "outputs": painted, "frozen": encoder}
            output = config.generator_loss(model, batch | {"label": inputs["class_ids"]}, KEY, STEP)
            return output.loss, (output.metrics, painted)

        return jax.value_and_grad(loss, has_aux=True)(model)

    ours, slopes = judgements(model)
    ours |= paintings(model)
    (total, (metrics, painted)), slope = trained(model)
    ours |= images(painted, "_train") | {"G_total": total, "G_loss": total - metrics["kl"]}
    ours |= running("dmgan", config, model, painted, oracle)
    ours |= wanted(restore("dmgan", config, slope), oracle)
    judged = replace(slope, discriminators=type(model.discriminators)(slopes))
    ours |= wanted({k: v for k, v in restore("dmgan", config, judged).items() if k.startswith("netD")}, oracle)
    return strided(ours, oracle) | matched(oracle, context)


def stackgan_v2(oracle: Oracle) -> dict[str, Any]:
    inputs, meta = oracle.inputs, oracle.config
    conditional = bool(meta["B_CONDITION"])
    hints = {"kl": float(meta["KL"]), "uncond_loss": float(meta["UNCOND_LOSS"]), "color": float(meta["COLOR_LOSS"])}
    config, model = convert("stackgan_v2", oracle.tensors, **hints)
    noise = jnp.asarray(inputs["noise"])
    eps = jnp.asarray(inputs["ca_noise"]) if conditional else jnp.zeros((len(noise), 0))
    batch = {"features": jnp.asarray(inputs["text_emb"])[:, None]} if conditional else {}

    @jax.jit
    def evaluated(model):
        painted = model.generator(model.generator.read(batch, len(noise)), noise, eps)
        ours = images(painted) | (codes(painted) if conditional else {})
        for n, (judge, stage) in enumerate(zip(model.discriminators, painted.stages, strict=True)):
            seen, _ = opinions(
                judge, enlarged(inputs["real_low"], stage.image.shape[1]), config.judged_condition(painted, n)
            )
            ours |= {f"D{n}_cond": seen[1], f"D{n}_uncond": seen[2]} if conditional else {f"D{n}_logit": seen[2]}
            ours[f"color_mean{n}"], ours[f"color_cov{n}"] = colors(stage.image)
            ours[f"color_mean{n}"] = ours[f"color_mean{n}"][..., None, None]
        return ours

    @jax.jit
    def trained(model):
        def generator_loss(model):
            painted = model.generator(model.generator.read(batch, len(noise)), noise, eps, train=True)
            output = config.generator_loss(model, {"image": noise, "outputs": painted}, KEY, STEP)
            return output.loss, (output.metrics, painted)

        (total, (metrics, painted)), slope = jax.value_and_grad(generator_loss, has_aux=True)(model)
        ours = images(painted, "_train") | {"G_total": total}
        ours["G_adversarial"] = sum(v for k, v in metrics.items() if k.startswith("adversarial"))
        made, slopes, judges = [stage.image for stage in painted.stages], [], []
        for n in range(1, len(made)):
            ours[f"like_mu{n}"], ours[f"like_cov{n}"] = color_differences(made[n], made[n - 1])
        for n, image in enumerate(made):
            real = enlarged(inputs["real_low"], image.shape[1])
            wrong = enlarged(inputs["wrong_low"], image.shape[1]) if conditional else None

            def judge_loss(judge, n=n, image=image, real=real, wrong=wrong):
                condition = config.judged_condition(painted, n)
                means, after = config.judge(judge, real, image, condition, train=True, wrong=wrong)
                return config.weighed(means, n)[0], after

            value, pull, after = jax.vjp(judge_loss, model.discriminators[n], has_aux=True)
            ours[f"D{n}_loss"] = value
            slopes.append(pull(jnp.ones(()))[0])
            judges.append(after)
        return ours, painted, slope, slopes, judges

    ours, painted, slope, slopes, judges = trained(model)
    ours |= evaluated(model) | running("stackgan_v2", config, model, painted, oracle)
    many = type(model.discriminators)
    after = restore("stackgan_v2", config, replace(model, discriminators=many(judges)))
    ours |= {f"D{n}_running_mean": after[f"netD{n}.img_code_s16.3.running_mean"] for n in range(len(judges))}
    ours |= wanted(restore("stackgan_v2", config, replace(slope, discriminators=many(slopes))), oracle)
    return strided(ours, oracle)


def stackgan(oracle: Oracle) -> dict[str, Any]:
    inputs = {k: jnp.asarray(v) for k, v in oracle.inputs.items()}
    _, model = convert("stackgan", oracle.tensors)

    @jax.jit
    def run(model):
        eps = jnp.concatenate([inputs["ca_noise_stage1"], inputs["ca_noise_stage2"]], -1)
        context = model.generator.read({"features": inputs["text_emb"][:, None]}, len(eps))
        painted = model.generator(context, inputs["noise"], eps)
        ours = {}
        for n, (judge, stage) in enumerate(zip(model.discriminators, painted.stages, strict=True)):
            seen, _ = opinions(judge, stage.image, stage.code.mean)
            ours |= {f"stage{n + 1}_img": nchw(stage.image), f"D{n + 1}_cond": seen[1], f"D{n + 1}_uncond": seen[2]}
            ours |= {f"mu{n + 1}": stage.code.mean, f"logvar{n + 1}": stage.code.log_variance}
        return {k: v for k, v in ours.items() if v is not None}

    return run(model)


SYSTEMS = {
    "attngan": attngan,
    "dmgan": dmgan,
    "stackgan": stackgan,
    "stackgan_v2": stackgan_v2,
    "stackgan_v2_uncond": stackgan_v2,
}
