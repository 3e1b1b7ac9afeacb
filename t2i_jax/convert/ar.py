"""Formats of next-token models."""

from dataclasses import replace
from pathlib import Path

from t2i_jax.codecs.clusters import ColorClusters
from t2i_jax.codecs.quantize import QuantizerConfig
from t2i_jax.convert import Format, ModelFolder, convert
from t2i_jax.core.family import with_fields
from t2i_jax.interop import clipgen, huggingface, imagegpt, llamagen, mingpt
from t2i_jax.interop.names import Fields, Tensors, require, source
from t2i_jax.models.ar import AR
from t2i_jax.networks.condition import ClassEmbedder, PrefixTokens
from t2i_jax.nn.positions import LearnedPositions
from t2i_jax.presets import GPT, OF_AR
from t2i_jax.sampling.options import ARSampler

MINGPT = AR(transformer=replace(GPT, dropout=0.1))
IMAGEGPT = OF_AR["imagegpt-s"]


def _llamagen(
    tensors: Tensors, *, grid: tuple[int, int] = (16, 16), head_dim: int = 0, null: bool = True, **fields: object
) -> AR:
    """grid: (16, 16) for 256 pixels, (24, 24) for 384, (32, 32) for 512; the file does not record it. null: the table
    of classes has a row for none."""
    found: Fields = {"grid": grid} | llamagen.describe(tensors, head_dim, null)
    found |= {} if null else {"condition_dropout": 0.0}
    return with_fields(AR(), **(found | fields))


def _mingpt(
    tensors: Tensors, *, grid: tuple[int, int] = (16, 16), heads: int = 0, prefix: int = 1, **fields: object
) -> AR:
    """prefix: tokens before the codes of the image: a start token, a class, codes of another image. For explicit
    vectors instead (`embeddings` of the published program):
    `condition=CrossAttnFeatures(width, count, trained_null=False)`.
    """
    published = {
        "condition_dropout": 0.0,
        "sampling": ARSampler(guidance=1.0),
        "grid": grid,
        "condition": PrefixTokens(prefix),
    }
    return with_fields(MINGPT, **(published | mingpt.describe(tensors, heads) | fields))


def _clipgen(tensors: Tensors, *, grid: tuple[int, int] = (16, 16), heads: int = 0, **fields: object) -> AR:
    published = {"condition_dropout": 0.0, "sampling": ARSampler(guidance=1.0, top_k=500, top_p=0.95), "grid": grid}
    return with_fields(MINGPT, **(published | clipgen.describe(tensors, heads) | fields))


def _imagegpt(tensors: Tensors, *, heads: int = 0, eps: float = 1e-5, **fields: object) -> AR:
    return with_fields(IMAGEGPT, **({"eps": eps} | imagegpt.describe(tensors, heads) | fields))


def _imagegpt_folder(path: Path) -> ModelFolder:
    """A folder of transformers, with the clusters of colours if it has them."""
    colors = imagegpt.clusters(path)
    codec = None if colors is None else convert("imagegpt-clusters", colors, str(path))
    tensors = huggingface.Weights(path, imagegpt.NEEDED)
    return ModelFolder(tensors, imagegpt.settings(huggingface.config(path)), codec)


def _clusters(tensors: Tensors, **fields: object) -> ColorClusters:
    require(tensors, (imagegpt.CLUSTERS,), "no clusters of colours")
    count, dim = tensors[imagegpt.CLUSTERS].shape
    return with_fields(ColorClusters(QuantizerConfig(count, dim, normalize=False)), **fields)


def _clusters_folder(path: Path) -> ModelFolder:
    colors = imagegpt.clusters(path)
    if colors is None:
        raise ValueError(f"{path}: has neither a preprocessor_config.json nor a kmeans_centers.npy")
    return ModelFolder(colors, {})


def _learned(config: AR) -> int:
    """Rows of the table of positions."""
    return config.positions.count if isinstance(config.positions, LearnedPositions) else 0


FORMATS = {
    "llamagen": Format(
        _llamagen,
        lambda config: llamagen.table(config.transformer, isinstance(config.conditioning.what, ClassEmbedder)),
        llamagen.UNUSED,
        needed=(llamagen.NEEDED,),
        title="LlamaGen's next-token models, class- or caption-conditional",
        example="c2i_L_384.pt --grid 24 24 --codec models/llamagen-vq",
    ),
    "taming-gpt": Format(
        _mingpt,
        lambda config: mingpt.table(config.transformer.head_size, config.output_bias),
        mingpt.UNUSED,
        needed=(mingpt.NEEDED,),
        part=mingpt.PART,
        buffers=lambda c: mingpt.buffers(_learned(c), c.transformer.depth, c.bidirectional_prefix),
        title="minGPT on the codes of taming-transformers",
        example="cin_transformer.ckpt --codec models/taming-vqgan",
    ),
    "imagegpt": Format(
        _imagegpt,
        lambda config: imagegpt.table(config.vocabulary, config.transformer.head_size),
        imagegpt.UNUSED,
        needed=(imagegpt.NEEDED,),
        folder=_imagegpt_folder,
        title="Image GPT as transformers keeps it: a folder, which has the clusters of colours, or its file alone",
        example="imagegpt-small/",
    ),
    "imagegpt-clusters": Format(
        _clusters,
        lambda config: {"quantizer.codebook": source(imagegpt.CLUSTERS)},
        needed=((imagegpt.CLUSTERS,),),
        folder=_clusters_folder,
        title="the clusters of colours of Image GPT: its folder, or one with kmeans_centers.npy",
        example="imagegpt-small/",
    ),
    "clipgen": Format(
        _clipgen,
        lambda config: clipgen.table(config.transformer.head_size, config.output_bias),
        clipgen.UNUSED,
        needed=(clipgen.NEEDED,),
        buffers=lambda config: clipgen.buffers(_learned(config), config.transformer.depth),
        title="CLIP-GEN's next-token model on one CLIP embedding",
        example="gpt_coco.pt --codec models/clipgen-vqgan --text clip:FOLDER",
    ),
}
