"""Formats of Gaussian diffusion: DiT, guided-diffusion (ADM), its classifiers, GLIDE, its noise-aware CLIP, RDM."""

import dataclasses
from typing import TypeVar

from t2i_jax.convert import Format
from t2i_jax.core.family import with_fields
from t2i_jax.core.noise import NoiseProcess
from t2i_jax.core.params import HasInit, abstract
from t2i_jax.interop import adm, dit, glide, ldm
from t2i_jax.interop.names import Fields, Table, Tensors
from t2i_jax.models.clip import CLIP
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.models.noised_classifier import NoisedClassifier
from t2i_jax.networks.clip import CLIPTowers
from t2i_jax.networks.condition import ClassEmbedder, Conditioning, CrossAttnFeatures
from t2i_jax.networks.dit import DiT
from t2i_jax.networks.glide_captions import GlideCaptions
from t2i_jax.networks.prior import EmbeddingPrior
from t2i_jax.networks.unet import UNet
from t2i_jax.nn.transformer import Transformer
from t2i_jax.noise.processes import Discrete, Flow
from t2i_jax.sampling.options import DiffusionSampler


def _dit(tensors: Tensors, *, heads: int = 0, null: bool = True, eps: float = 1e-6, **fields: object) -> Diffusion:
    """null: the last row of the table of classes is the null class; models trained without dropout have none."""
    found = dit.describe(tensors, heads)
    found |= {"condition": ClassEmbedder(found.pop("classes") - null, null), "condition_dropout": 0.1 if null else 0.0}
    published = {"process": Discrete("linear"), "guided_channels": 3}
    return with_fields(Diffusion(with_fields(DiT(), **(found | {"eps": eps}))), **(published | fields))


def _sit(tensors: Tensors, *, heads: int = 0, null: bool = True, **fields: object) -> Diffusion:
    """The networks and the names of DiT, trained on a flow (Ma et al. 2024)."""
    published = {"process": Flow("uniform", toward=True), "predicts": "drift", "solver": "heun", "guided_channels": 3}
    network = _dit(tensors, heads=heads, null=null).network
    published |= {
        "discard_variance_output": network.learn_variance,
        "sampling": DiffusionSampler(guidance=4.0, eta=0.0),
    }
    return with_fields(Diffusion(network), **(published | fields))


def _unet(
    tensors: Tensors,
    size: int = 0,
    blocks: int = 0,
    heads: int = 0,
    head_dim: int | None = None,
    up_heads: int = 0,
    qkv_first: bool | None = None,
    **fields: object,
) -> UNet:
    """Values that do not follow from shapes are those of the released model of these levels and widths."""
    found = adm.describe(tensors, blocks)
    of_128 = found["multipliers"] == (1, 1, 2, 3, 4)
    to_256 = found["width"] == 192 and found["extra_inputs"] and len(found["multipliers"]) == 6
    if head_dim is None:
        head_dim = 0 if heads or ((of_128 or to_256) and found["width"] >= 192) else 64
    if qkv_first is None:
        qkv_first = found["width"] == 192 and found["multipliers"] == (1, 2, 3, 4)
    if size:
        found["size"] = (size, size)
    kind = {"heads": heads or 4, "head_dim": head_dim, "up_heads": up_heads, "qkv_first": qkv_first}
    return with_fields(UNet(conditioning=None), **(found | kind | fields))


def _adm(
    tensors: Tensors, *, schedule: str = "", steps: int = 1000, process: NoiseProcess | None = None, **hints: object
) -> Diffusion:
    """hints: `size`, `blocks`, `heads` or `head_dim`, `up_heads`, `qkv_first` of `_unet`, and fields of the network."""
    table = tensors.get("label_emb.weight")
    classes = None if table is None else Conditioning(ClassEmbedder(table.shape[0], null=False), dropout=0.0)
    fields: Fields = {"conditioning": classes, **hints}
    network = _unet(tensors, **fields)
    schedule = schedule or ("cosine" if network.multipliers == (1, 2, 3, 4) and network.width == 192 else "linear")
    return Diffusion(
        network,
        process=process or Discrete(schedule, steps),
        sampling=DiffusionSampler(steps=min(250, steps), guidance=1.0, clip=True),
    )


def _adm_classifier(
    tensors: Tensors, *, size: int = 0, schedule: str = "", steps: int = 1000, **hints: object
) -> NoisedClassifier:
    """As `_adm`. The released one for 64 pixels belongs to a cosine schedule, the others to a linear one."""
    head = adm.describe_pool(tensors)
    fields: Fields = {"head_dim": 64, "qkv_first": False} | hints
    trunk = _unet(tensors, size, **fields)
    if head["side"]:
        trunk = _unet(tensors, head["side"] * 2 ** (len(trunk.multipliers) - 1), **fields)
    schedule = schedule or ("cosine" if len(trunk.multipliers) == 4 else "linear")
    return NoisedClassifier(trunk, head["classes"], head["pool"], Discrete(schedule, steps))


def _glide(
    tensors: Tensors,
    *,
    text_heads: int = 0,
    schedule: str = "",
    steps: int = 1000,
    process: NoiseProcess | None = None,
    **hints: object,
) -> Diffusion:
    """text_heads: of the caption encoder; else as `_adm`."""
    text = adm.describe_text(tensors)
    captions = GlideCaptions(**text, heads=text_heads or max(1, text["width"] // 64))
    read = {"conditioning": Conditioning(captions, dropout=0.2), "context": text["width"], "pool": "last"}
    fields: Fields = read | {"qkv_first": False} | hints
    network = _unet(tensors, **fields)
    schedule = schedule or ("linear" if "low_res" in network.extra_inputs else "cosine")
    return Diffusion(
        network,
        process=process or Discrete(schedule, steps),
        guided_channels=3,
        sampling=DiffusionSampler(steps=min(100, steps), clip=True),
    )


def _rdm(
    tensors: Tensors,
    *,
    size: int = 0,
    head_dim: int = 32,
    length: int = 0,
    last: float = 0.0,
    **fields: object,
) -> Diffusion:
    """Values that do not follow from shapes are those of the released model of this width of the context, 768 of the
    one for 768 pixels. size: side of the latents; length: vectors that the network reads; last: noise variance of the
    last step."""
    found: Fields = ldm.describe(tensors)
    large = found["context"] == 768
    read = CrossAttnFeatures(found["context"], length or (11 if large else 4), trained_null=False, zero_null=True)
    found |= {"size": (size or (48 if large else 64),) * 2, "head_dim": head_dim, "conditioning": Conditioning(read)}
    sampling = DiffusionSampler(50, guidance=5.0) if large else DiffusionSampler(100, guidance=2.0)
    published: Fields = {
        "process": Discrete("scaled_linear", ends=(0.0015, last or (0.015 if large else 0.0195))),
        "solver": "ddim",
        "sampling": dataclasses.replace(sampling, spacing="leading"),
    }
    return with_fields(Diffusion(with_fields(UNet(), **found)), **(published | fields))


def _glide_clip(tensors: Tensors, *, head_dim: int = 64, **fields: object) -> CLIP:
    """Both files in one, under `clip_text.` and `clip_image.`."""
    found: Fields = glide.describe(tensors, head_dim)
    text, image = (dataclasses.replace(GLIDE_CLIP, **found.pop(part)) for part in ("text", "image"))
    towers = CLIPTowers(text, image, last=True, **found)
    noise = Discrete("cosine", towers.times or 1000)
    return with_fields(CLIP(towers, scale=100.0, learn_scale=False, same="none", noise=noise), **fields)


GLIDE_CLIP = Transformer(norm="layer", activation="gelu", bias=True, key_bias=False)
"""Blocks of both towers of GLIDE's CLIP."""


N = TypeVar("N", DiT, UNet, EmbeddingPrior)


def network_of(config: Diffusion, kind: type[N]) -> N:
    """The network of a diffusion model. Errors: ValueError for one of another kind."""
    if not isinstance(config.network, kind):
        raise ValueError(f"its network is a {type(config.network).__name__}, not a {kind.__name__}")
    return config.network


def _adm_table(config: HasInit) -> Table:
    return adm.table(abstract(config))


FORMATS = {
    "dit": Format(
        _dit,
        lambda config: dit.table(network_of(config, DiT)),
        needed=(dit.NEEDED,),
        title="DiT, by the class, on the codes of Stable Diffusion's autoencoder",
        example="DiT-XL-2-256x256.pt --codec models/kl_diffusers",
    ),
    "sit": Format(
        _sit,
        lambda config: dit.table(network_of(config, DiT)),
        needed=(dit.NEEDED,),
        title="SiT: DiT's networks trained on a flow",
        example="SiT-XL-2-256x256.pt --codec models/kl_diffusers",
    ),
    "adm": Format(
        _adm,
        _adm_table,
        needed=(adm.NEEDED,),
        part="unet.",
        title="the UNets of guided-diffusion (ADM), upsamplers included",
        example="256x256_diffusion.pt",
    ),
    "adm_classifier": Format(
        _adm_classifier,
        _adm_table,
        needed=(adm.NEEDED,),
        part="classifier.",
        title="the classifiers of noised images of guided-diffusion, for `t2i sample --classifier`",
        example="256x256_classifier.pt",
    ),
    "glide": Format(
        _glide,
        _adm_table,
        needed=(adm.NEEDED,),
        part="unet.",
        title="GLIDE: its base model and its upsampler",
        example="base.pt",
    ),
    "rdm": Format(
        _rdm,
        lambda config: ldm.table(abstract(config), network_of(config, UNet)),
        needed=(ldm.NEEDED,),
        part="model.diffusion_model.",
        title="retrieval-augmented diffusion (RDM), and its model of 768 pixels in latent-diffusion",
        example="model.ckpt --codec models/kl --text neighbours:ViT-B-32.pt,database=openimages",
    ),
    "glide_clip": Format(
        _glide_clip,
        lambda config: glide.table(
            config.towers.text.head_size, config.towers.image.head_size, config.towers.times > 0
        ),
        unused=r"^(?!clip_)",
        needed=glide.NEEDED,
        files={"clip_text_enc": "clip_text.", "clip_image_enc": "clip_image."},
        title="GLIDE's CLIP of noised images: a folder with clip_text_enc.pt and clip_image_enc.pt",
        example="FOLDER",
    ),
}
