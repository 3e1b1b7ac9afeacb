"""Published and own shapes as configs, by name.

model = preset("llamagen-b", grid=(24, 24), condition=ClassEmbedder(10))
"""

from __future__ import annotations

from dataclasses import replace

from t2i_jax.codecs.autoencoder import AutoencoderConfig
from t2i_jax.codecs.discriminator import StyleDiscriminatorConfig
from t2i_jax.codecs.quantize import QuantizerConfig
from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.core.errors import ConfigError, did_you_mean
from t2i_jax.core.family import with_fields
from t2i_jax.heads import DiffusionHead, SoftmaxHead
from t2i_jax.models.ar import AR
from t2i_jax.models.coarse_to_fine import CoarseToFine
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.models.gan import GAN, GradientPenalty
from t2i_jax.models.masked import Masked
from t2i_jax.models.staged_gan import ALONE, PAIRS, SUMS, StagedGAN, Terms
from t2i_jax.models.stream import Stream, StreamText
from t2i_jax.models.unclip import UnCLIP
from t2i_jax.models.var import VAR
from t2i_jax.networks.condition import (
    ClassEmbedder,
    Conditioning,
    CrossAttnFeatures,
    Joined,
    LowCodes,
    SentenceAndWords,
    TextFeatures,
)
from t2i_jax.networks.dit import DiT
from t2i_jax.networks.imagen import AttentionPooledFeatures
from t2i_jax.networks.local import LocalTransformer
from t2i_jax.networks.one_stage import OneStage, SemanticSpatial
from t2i_jax.networks.one_way import OneWay
from t2i_jax.networks.prior import EmbeddingPrior
from t2i_jax.networks.staged_discriminator import ScaleDiscriminator
from t2i_jax.networks.staged_generator import Augmentation, DynamicMemory, Joint, Redraw, StagedGenerator, WordAttention
from t2i_jax.networks.unclip import CaptionAndTokens, ImageAndCaption
from t2i_jax.networks.understanding import Understanding
from t2i_jax.networks.unet import UNet
from t2i_jax.nn.positions import LearnedPositions
from t2i_jax.nn.transformer import Transformer
from t2i_jax.noise.processes import Discrete
from t2i_jax.sampling.options import (
    ARSampler,
    CoarseToFineSampler,
    DiffusionSampler,
    GANSampler,
    MaskedSampler,
    StreamSampler,
    UnCLIPSampler,
)
from t2i_jax.sampling.orders import Confidence, MaskRate

LLAMA = AR().transformer
"""RMSNorm, SwiGLU, no biases (Touvron et al. 2023), as LlamaGen."""
GPT = Stream().transformer
"""LayerNorm, GELU, biases (Radford et al. 2019), as minDALL-E."""
COGVIEW = replace(GPT, sandwich_norm=True, pb_relax=True)
COGVIEW2 = LocalTransformer().transformer
"""Sandwich LayerNorm and GELU by tanh (Ding et al. 2022)."""
MAR = Masked().transformer
"""LayerNorm, GELU, biases, dropout (Li et al. 2024)."""
BERT = Transformer(768, 24, 16, norm="layer", eps=1e-12, post_norm=True, activation="gelu_tanh", bias=True, dropout=0.1)
"""LayerNorm after the residual sum, GELU, biases, dropout (Devlin et al. 2019), as MaskGIT."""
ADALN = DiT().transformer
"""Blocks of DiT (Peebles & Xie 2023)."""


def _ar(width: int, depth: int, heads: int, mlp: int, kv_heads: int = 0) -> AR:
    return AR(transformer=replace(LLAMA, width=width, depth=depth, heads=heads, mlp=mlp, kv_heads=kv_heads))


def _mar(width: int, depth: int, heads: int, head: DiffusionHead) -> Masked:
    return Masked(transformer=replace(MAR, width=width, depth=depth, heads=heads), head=head)


def _dit(width: int, depth: int, heads: int) -> Diffusion:
    network = DiT(transformer=replace(ADALN, width=width, depth=depth, heads=heads))
    return Diffusion(network, Discrete("linear"), guided_channels=3)


def _imagegpt(width: int, depth: int, heads: int) -> AR:
    """Every pixel of 32 x 32 is a code, one of 512 clusters of colours."""
    shape = replace(LLAMA, width=width, depth=depth, heads=heads, activation="quick_gelu", bias=True)
    return AR(
        vocabulary=512,
        grid=(32, 32),
        transformer=shape,
        conditioning=Conditioning(ClassEmbedder(0), dropout=0.0),
        positions=LearnedPositions(),
        sampling=ARSampler(guidance=1.0),
    )


_RARM = AR(
    vocabulary=16384,
    grid=(16, 16),
    transformer=replace(GPT, width=768, depth=18, heads=12),
    conditioning=Conditioning(
        CrossAttnFeatures(512, 4, trained_null=False, zero_null=True), via="cross_attention", dropout=0.0
    ),
    positions=LearnedPositions(),
    sampling=ARSampler(guidance=1.0),
)
"""The autoregressive model of Blattmann et al. 2022, by the embeddings of 4 neighbours; its codec has 16384 codes."""


def _var(depth: int) -> VAR:
    shape = replace(VAR().transformer, width=64 * depth, depth=depth, heads=depth)
    return VAR(transformer=shape, drop_path=0.1 * depth / 24)


OF_AR: dict[str, AR] = {
    "1M": _ar(128, 4, 4, 384),
    "5M": _ar(256, 6, 4, 704),
    "30M": _ar(512, 9, 8, 1408),
    "llamagen-b": _ar(768, 12, 12, 2048),  # 0.1 B
    "llamagen-l": _ar(1024, 24, 16, 2816),  # 0.3 B
    "llamagen-xl": _ar(1280, 36, 20, 3584),  # 0.8 B
    "llamagen-1b": _ar(2048, 22, 32, 5632),
    "llamagen-xxl": _ar(1536, 48, 24, 4096),  # 1.4 B
    "llamagen-3b": _ar(3200, 24, 32, 8704),
    "llamagen-xxxl": _ar(2560, 48, 40, 6912),  # 3.9 B
    "llamagen-7b": _ar(4096, 32, 32, 11008),
    "imagegpt-s": _imagegpt(512, 24, 8),  # 76 M
    "imagegpt-m": _imagegpt(1024, 36, 8),  # 455 M
    "imagegpt-l": _imagegpt(1536, 48, 16),  # 1.4 B
    "rarm": _RARM,  # 188 M
    "20B": _ar(6144, 52, 48, 16384, kv_heads=8),  # the size of the largest Parti
}
"""Next-token models; parameter counts exclude the condition."""
OF_STREAM: dict[str, Stream] = {
    "stream-5M": Stream(transformer=GPT),
    "mindalle": Stream(transformer=replace(GPT, width=1536, depth=42, heads=24)),  # 1.3 B
    "cogview": Stream(transformer=replace(COGVIEW, width=2560, depth=48, heads=40), tied=True, one_softmax=True),  # 4 B
    "coglm": Stream(
        vocabulary=20000,
        grid=(20, 20),
        condition=StreamText(130000, 110, bidirectional=True, end=125653),
        transformer=replace(COGVIEW2, width=3072, depth=48, heads=48),
        tied=True,
        one_softmax=True,
        places=(513, 511),
        understanding=Understanding(125654),
        clusters=500,
        condition_dropout=0.0,
        sampling=StreamSampler(guidance=1.0, temperature=1.15, text_weight=1.4, top_clusters=16),
    ),  # 6 B
    "dalle": Stream(
        transformer=replace(GPT, width=3968, depth=64, heads=62),
        positions="axial",
        attention=("row", "column", "row", "row"),
    ),  # 12 B
}
OF_COARSE_TO_FINE: dict[str, CoarseToFine] = {
    "cogview2": CoarseToFine(
        OF_STREAM["coglm"],
        direct=LocalTransformer(
            OF_STREAM["coglm"].transformer, hidden=125653, own_attention=True, places=1024, coarse_place=513
        ),
        refiner=LocalTransformer(OF_STREAM["coglm"].transformer, "text", 16, hidden=125653, places=1024),
        clusters=500,
        sampling=CoarseToFineSampler(
            guidance=1.0,
            temperature=1.15,
            text_weight=1.4,
            top_clusters=16,
            direct_top_clusters=100,
            direct_cluster_temperature=0.89,
        ),
    )
}
MASKGIT = Masked(
    head=SoftmaxHead(1024, label_smoothing=0.1),
    order=Confidence(),
    rate=MaskRate("cosine", least=0.5),
    transformer=BERT,
    reads="all",
    tied=True,
    buffer=1,
    conditioning=Conditioning(ClassEmbedder(1000, null=False), dropout=0.0),
    average="images",
    sampling=MaskedSampler(guidance=1.0, iterations=8, original=True),
)
"""MaskGIT (Chang et al. 2022) on 16 x 16 codes, as released: without an unconditional branch."""
MASKGIT_VQGAN = VQGAN(
    AutoencoderConfig(
        decoder_blocks=2,
        attention=(),
        middle_attention=False,
        down="average",
        bias=False,
        shortcut_of="branch",
        out_kernel=1,
        unit_range=True,
    ),
    QuantizerConfig(1024, 256, normalize=False, entropy=0.1),
    convolutions=False,
    pixel_weight=0.25,
    perceptual=0.1,
    adversarial=0.1,
    adversary="vanilla",
    generator_adversary="vanilla",
    r1=20.0,
    start=0,
    discriminator=StyleDiscriminatorConfig(),
)
"""The codec of MaskGIT (55 M) and how it was trained, on 256 x 256 pixels. Its pixels are in [0, 1], so that squares of
gradients by them are 4 times as large, and its loss of the discriminator is twice that of this library."""
MUSE = Masked(
    head=SoftmaxHead(8192),
    order=Confidence(),
    rate=MaskRate("cosine"),
    transformer=replace(MAR, width=2048, depth=48, heads=16),
    reads="all",
    conditioning=Conditioning(TextFeatures(4096, 128), via="cross_attention"),
    sampling=MaskedSampler(guidance=4.0, iterations=24),
)
"""The base model of Muse (Chang et al. 2023) on 16 x 16 codes, by all vectors of a T5-XXL."""
MUSE_SR = replace(
    MUSE,
    grid=(64, 64),
    transformer=replace(MAR, width=1024, depth=32, heads=16),
    conditioning=Conditioning(Joined((TextFeatures(4096, 128), LowCodes())), via="cross_attention"),
    sampling=MaskedSampler(guidance=4.0, iterations=8),
)
"""Its second stage, on 64 x 64 codes. Muse has one codec for each stage; here the codec of the large image also makes
the 16 x 16 codes of the small one."""
OF_MASKED: dict[str, Masked] = {
    "mar-b": _mar(768, 12, 12, DiffusionHead(width=1024, depth=6)),  # 208 M
    "mar-l": _mar(1024, 16, 16, DiffusionHead(width=1280, depth=8)),  # 478 M
    "mar-h": _mar(1280, 20, 16, DiffusionHead(width=1536, depth=12)),  # 942 M
    "maskgit": MASKGIT,  # 172 M
    "maskgit-512": replace(MASKGIT, grid=(32, 32), sampling=replace(MASKGIT.sampling, iterations=12)),  # 173 M
    "muse": MUSE,  # 3 B
    "muse-sr": MUSE_SR,  # 0.8 B
}
OF_DIFFUSION: dict[str, Diffusion] = {
    "dit-s": _dit(384, 12, 6),  # 33 M
    "dit-b": _dit(768, 12, 12),  # 130 M
    "dit-l": _dit(1024, 24, 16),  # 458 M
    "dit-xl": _dit(1152, 28, 16),  # 675 M
}
"""DiT with patches of 2, on 32 x 32 latents of 4 channels."""
OF_GAN: dict[str, GAN] = {
    "dfgan": GAN(sampling=GANSampler(0.88, 2.0)),  # 10 M, and 7 M of the discriminator
    "ssagan": GAN(
        OneStage(width=64, block=SemanticSpatial()),
        OneWay(64, 16),
        penalty=GradientPenalty(apart=True),
        mismatched="shifted",
    ),  # 29 M, and 80 M of the discriminator
}
"""GANs of 256 x 256 pixels on the sentences of DAMSM; SSA-GAN is trained with `matching`, too."""

_ATTNGAN = StagedGAN(mismatched="shifted")
_DMGAN = replace(
    _ATTNGAN,
    network=StagedGenerator(width=64, stages=2 * (DynamicMemory(2),)),
    discriminator=ScaleDiscriminator(32, "spectral"),
)
_STACKGAN_V2 = StagedGAN(
    StagedGenerator(width=64, stages=2 * (Joint(2),), augmentation=Augmentation(128)),
    ScaleDiscriminator(64, condition_first=True),
    CrossAttnFeatures(1024, 1, trained_null=False),
    judged="mean",
    terms=(SUMS,),
    mismatched="images",
    kl=2.0,
)
OF_STAGED_GAN: dict[str, StagedGAN] = {
    "stackgan": StagedGAN(
        StagedGenerator(
            width=96, stages=(Redraw(192, 4),), augmentation=Augmentation(128, "relu"), gate="relu", noise_first=True
        ),
        ScaleDiscriminator(96, alone="last"),
        CrossAttnFeatures(1024, 1, trained_null=False),
        judged="mean",
        terms=(PAIRS, Terms()),
        mismatched="shifted",
        kl=2.0,
    ),
    "stackgan-v2": _STACKGAN_V2,  # 21 M
    "stackgan-v2-alone": replace(
        _STACKGAN_V2, condition=ClassEmbedder(0), judged="sentence", terms=(ALONE,), color=50.0
    ),  # 16 M, without captions
    "attngan": _ATTNGAN,  # 7 M, birds
    "attngan-coco": replace(
        _ATTNGAN,
        network=StagedGenerator(width=48, stages=2 * (WordAttention(3),)),
        discriminator=ScaleDiscriminator(96),
        condition=SentenceAndWords(256, 15),
        matching_weight=50.0,
    ),  # 14 M
    "dmgan": _DMGAN,  # 21 M, birds
    "dmgan-coco": replace(
        _DMGAN,
        network=StagedGenerator(width=64, stages=2 * (DynamicMemory(3),)),
        condition=SentenceAndWords(256, 12),
        matching_weight=50.0,
    ),  # 22 M
}
"""GANs in stages, of 256 x 256 pixels. AttnGAN and DM-GAN are trained with `matching`, too."""

OF_VAR: dict[str, VAR] = {
    "var-d16": _var(16),  # 310 M
    "var-d20": _var(20),  # 601 M
    "var-d24": _var(24),  # 1.0 B
    "var-d30": _var(30),  # 2.0 B
    "var-d36": replace(
        _var(36),
        quantizer=replace(VAR().quantizer, scales=(1, 2, 3, 4, 6, 9, 13, 18, 24, 32)),
        shared=True,
    ),  # 2.4 B, 512 x 512 pixels
    "var-d16-text": replace(
        _var(16), conditioning=Conditioning(TextFeatures(1024, 64), via="cross_attention")
    ),  # features of a T5-large
}
"""Next-scale models of 256 x 256 pixels, if not said otherwise; those of classes are published."""
_CAPTION = CrossAttnFeatures(768, 78)
"""Embedding and tokens of a caption by CLIP ViT-L/14."""
_KARLO_PRIOR = Diffusion(
    EmbeddingPrior(conditioning=Conditioning(CaptionAndTokens(_CAPTION))),
    Discrete("cosine"),
    "x0",
    "fixed_small",
    clip_range=10.0,
    sampling=DiffusionSampler(25, guidance=4.0, clip=True),
)
_KARLO_DECODER = Diffusion(
    UNet(
        width=320,
        blocks=3,
        head_dim=64,
        conditioning=Conditioning(ImageAndCaption(_CAPTION)),
        context=1536,
        pool="summary",
    ),
    Discrete("cosine"),
    guided_channels=3,
    sampling=DiffusionSampler(50, guidance=8.0, clip=True),
)
OF_UNCLIP: dict[str, UnCLIP | Diffusion] = {
    "karlo": UnCLIP(_KARLO_PRIOR, _KARLO_DECODER, sampling=UnCLIPSampler(50, guidance=8.0, clip=True)),
    "karlo-sr": Diffusion(
        UNet(
            (256, 256),
            width=320,
            blocks=3,
            attention=(),
            middle_attention=False,
            scale_shift=False,
            conditioning=None,
            extra_inputs=("low_res",),
            upscaling="cubic",
            learn_variance=False,
            last_times=1,
        ),
        Discrete("cosine"),
        variance="fixed_small",
        upscale=4,
        sampling=DiffusionSampler(7, guidance=1.0, clip=True),
    ),  # 1.4 B
}
"""unCLIP of 64 x 64 pixels, 1.0 B of the prior and 0.9 B of the decoder, and what enlarges them to 256 x 256."""
_T5 = CrossAttnFeatures(4096, 77)
"""All vectors of a caption by a T5-XXL, those of padding too."""


def _imagen(side: int, network: UNet, width: int, sampling: DiffusionSampler, **fields: object) -> Diffusion:
    """A stage of a cascade by T5; width: of the embedding of the time."""
    conditioning = Conditioning(AttentionPooledFeatures(_T5, 64, width))
    network = replace(network, size=(side, side), conditioning=conditioning, pool="summary")
    return replace(Diffusion(network, Discrete("cosine"), guided_channels=3, sampling=sampling), **fields)


def _upsampled(side: int, network: UNet, width: int, sampling: DiffusionSampler) -> Diffusion:
    network = replace(network, extra_inputs=("low_res",), noise_aug_conditioning=True)
    noised = {"upscale": 4, "noise_aug": 1.0, "low_res_process": Discrete("cosine")}
    return _imagen(side, network, width, sampling, **noised)


def _if(width: int) -> Diffusion:
    network = UNet(width=width, blocks=3, head_dim=64, context=4 * width, context_norm="group", activation="gelu")
    thresholded = DiffusionSampler(100, guidance=7.0, spacing="smart100", threshold=0.95, threshold_most=1.5)
    return _imagen(64, network, 4 * width, thresholded)


_IMAGEN = UNet(width=512, blocks=3, head_dim=64, context=2048, context_norm="layer", learn_variance=False)
_EFFICIENT = UNet(
    width=128,
    multipliers=(1, 1, 2, 4, 8),
    level_blocks=(0, 2, 4, 8, 8),
    attention=(16,),
    heads=8,
    resample="conv",
    resample_first=True,
    residual_scale=0.7071,
    context=512,
    context_norm="layer",
    learn_variance=False,
    upscaling="cubic",
)
_THRESHOLDED = DiffusionSampler(256, guidance=7.0, threshold=0.995)
OF_IMAGEN: dict[str, Diffusion] = {
    "imagen": _imagen(64, _IMAGEN, 2048, _THRESHOLDED),  # 2.3 B
    "imagen-sr": _upsampled(256, _EFFICIENT, 512, replace(_THRESHOLDED, noise_aug=0.2)),  # 0.8 B
    "imagen-sr-1024": _upsampled(
        1024, replace(_EFFICIENT, only_context=(16,)), 512, replace(_THRESHOLDED, noise_aug=0.1)
    ),
    "if-i-m": _if(192),  # 372 M
    "if-i-l": _if(320),  # 936 M
    "if-i-xl": _if(704),  # 4.3 B
}
"""Cascades of pixels by a T5-XXL. The weights of Imagen are not public: its levels and blocks are those of its paper's
appendix, the width of the context and a skip for every block are ours, which makes the upsamplers larger than its 600 M
and 400 M. Of DeepFloyd IF here are the first stages; the others are read from their files alone."""

OF_LATENTS: dict[str, Diffusion] = {
    "sd-upscaler": Diffusion(
        UNet(
            (128, 128),
            channels=4,
            width=256,
            multipliers=(1, 2, 2, 4),
            attention=(2, 4, 8),
            only_context=(2, 4),
            heads=8,
            transformers=1,
            scale_shift=False,
            resample="conv",
            conditioning=Conditioning(CrossAttnFeatures(1024, 77)),
            context=1024,
            pool="none",
            extra_inputs=("low_res",),
            low_res_channels=3,
            noise_aug_conditioning=True,
            noise_levels=1000,
            learn_variance=False,
        ),
        Discrete("scaled_linear", ends=(1e-4, 0.02)),
        "v",
        noise_aug=0.35,
        low_res_process=Discrete("scaled_linear", ends=(1e-4, 0.02)),
        solver="ddim",
        sampling=DiffusionSampler(50, guidance=9.0, spacing="leading", noise_aug=0.02),
    ),  # 473 M
}
"""Stable Diffusion's upscaler, from 128 x 128 to 512 x 512 pixels by latents of a codec of factor 4."""

Preset = AR | Stream | CoarseToFine | Masked | Diffusion | GAN | StagedGAN | UnCLIP | VAR
PRESETS: dict[str, Preset] = (
    OF_AR
    | OF_STREAM
    | OF_COARSE_TO_FINE
    | OF_MASKED
    | OF_DIFFUSION
    | OF_GAN
    | OF_STAGED_GAN
    | OF_UNCLIP
    | OF_IMAGEN
    | OF_LATENTS
    | OF_VAR
)


def preset(name: str, **fields: object) -> Preset:
    """A config of `PRESETS` with other values of fields, its own or those of its parts: `grid`, `dtype`, `condition`.

    Errors: `ConfigError` for an unknown name or field.

    >>> model = preset("llamagen-b", grid=(24, 24), dtype="bfloat16")
    >>> model.grid, model.compute.dtype, model.transformer.width
    ((24, 24), 'bfloat16', 768)
    """
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r}: one of {', '.join(PRESETS)}{did_you_mean(name, PRESETS)}")
    return with_fields(PRESETS[name], **fields)
