"""Text-to-image generation in JAX: codecs, autoregression, masked generation, diffusion, GANs; from a laptop to a pod.

    import t2i_jax as t2i

    pipe = t2i.load("runs/quickstart/model")
    images = pipe(["an emoji of pizza"] * 4, seeds=range(4))

Names are imported when they are used first: `import t2i_jax` itself imports no JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from t2i_jax.api import load as load
    from t2i_jax.api import train as train
    from t2i_jax.codecs.clusters import ColorClusters as ColorClusters
    from t2i_jax.codecs.dvae import DVAE as DVAE
    from t2i_jax.codecs.kl import KL as KL
    from t2i_jax.codecs.principal import PrincipalCodes as PrincipalCodes
    from t2i_jax.codecs.taesd import TAESD as TAESD
    from t2i_jax.codecs.vqgan import VQGAN as VQGAN
    from t2i_jax.core.errors import ConfigError as ConfigError
    from t2i_jax.core.errors import DataError as DataError
    from t2i_jax.core.family import with_fields as with_fields
    from t2i_jax.core.sharding import MeshConfig as Mesh  # noqa: F401
    from t2i_jax.core.types import Compute as Compute
    from t2i_jax.data.pipeline import Data as Data
    from t2i_jax.data.sources import ArrayRecord as ArrayRecord
    from t2i_jax.data.sources import Folder as Folder
    from t2i_jax.data.sources import Mixture as Mixture
    from t2i_jax.data.sources import Parquet as Parquet
    from t2i_jax.data.sources import TarShards as TarShards
    from t2i_jax.data.sources import Tfds as Tfds
    from t2i_jax.edits import Blend as Blend
    from t2i_jax.edits import InitImage as InitImage
    from t2i_jax.edits import Inpaint as Inpaint
    from t2i_jax.edits import Vary as Vary
    from t2i_jax.guides import Autoguidance as Autoguidance
    from t2i_jax.guides import ClassifierGuidance as ClassifierGuidance
    from t2i_jax.guides import Reference as Reference
    from t2i_jax.heads import DiffusionHead as DiffusionHead
    from t2i_jax.heads import FlowHead as FlowHead
    from t2i_jax.heads import MixtureHead as MixtureHead
    from t2i_jax.heads import SoftmaxHead as SoftmaxHead
    from t2i_jax.models.any_order import AnyOrder as AnyOrder
    from t2i_jax.models.ar import AR as AR
    from t2i_jax.models.clip import CLIP as CLIP
    from t2i_jax.models.coarse_to_fine import CoarseToFine as CoarseToFine
    from t2i_jax.models.damsm import DAMSM as DAMSM
    from t2i_jax.models.diffusion import Diffusion as Diffusion
    from t2i_jax.models.gan import GAN as GAN
    from t2i_jax.models.masked import Masked as Masked
    from t2i_jax.models.staged_gan import StagedGAN as StagedGAN
    from t2i_jax.models.stream import Stream as Stream
    from t2i_jax.models.unclip import UnCLIP as UnCLIP
    from t2i_jax.models.var import VAR as VAR
    from t2i_jax.models.vq_diffusion import VQDiffusion as VQDiffusion
    from t2i_jax.networks.clip import CLIPTowers as CLIPTowers
    from t2i_jax.networks.condition import CaptionEncoder as CaptionEncoder
    from t2i_jax.networks.condition import ClassEmbedder as ClassEmbedder
    from t2i_jax.networks.condition import Conditioning as Conditioning
    from t2i_jax.networks.condition import CrossAttnFeatures as CrossAttnFeatures
    from t2i_jax.networks.condition import PooledFeatures as PooledFeatures
    from t2i_jax.networks.condition import SentenceAndWords as SentenceAndWords
    from t2i_jax.networks.condition import TextFeatures as TextFeatures
    from t2i_jax.networks.dit import DiT as DiT
    from t2i_jax.networks.imagen import AttentionPooledFeatures as AttentionPooledFeatures
    from t2i_jax.networks.local import LocalTransformer as LocalTransformer
    from t2i_jax.networks.neighbours import NeighbourMaps as NeighbourMaps
    from t2i_jax.networks.one_stage import OneStage as OneStage
    from t2i_jax.networks.one_way import OneWay as OneWay
    from t2i_jax.networks.prior import EmbeddingPrior as EmbeddingPrior
    from t2i_jax.networks.staged_generator import StagedGenerator as StagedGenerator
    from t2i_jax.networks.unclip import CaptionAndTokens as CaptionAndTokens
    from t2i_jax.networks.unclip import ImageAndCaption as ImageAndCaption
    from t2i_jax.networks.unclip import NoisedImageAndTokens as NoisedImageAndTokens
    from t2i_jax.networks.unclip import Similarity as Similarity
    from t2i_jax.networks.unet import UNet as UNet
    from t2i_jax.nn.lora import LoRA as LoRA
    from t2i_jax.nn.positions import AxialPositions as AxialPositions
    from t2i_jax.nn.positions import LearnedPositions as LearnedPositions
    from t2i_jax.nn.positions import RotaryPositions as RotaryPositions
    from t2i_jax.nn.positions import SinCosPositions as SinCosPositions
    from t2i_jax.nn.transformer import Transformer as Transformer
    from t2i_jax.noise.processes import EDM as EDM
    from t2i_jax.noise.processes import Discrete as Discrete
    from t2i_jax.noise.processes import Flow as Flow
    from t2i_jax.pipeline import Pipeline as Pipeline
    from t2i_jax.presets import PRESETS as PRESETS
    from t2i_jax.presets import preset as preset
    from t2i_jax.text.clip import ClipCaption as ClipCaption
    from t2i_jax.text.clip import ClipEmbedding as ClipEmbedding
    from t2i_jax.text.clip import ClipText as ClipText
    from t2i_jax.text.damsm import CaptionWords as CaptionWords
    from t2i_jax.text.damsm import DamsmText as DamsmText
    from t2i_jax.text.minilm import MiniLM as MiniLM
    from t2i_jax.text.retrieval import NeighbourPairs as NeighbourPairs
    from t2i_jax.text.retrieval import Neighbours as Neighbours
    from t2i_jax.text.sentencepiece import SentencePiece as SentencePiece
    from t2i_jax.text.t5 import T5 as T5
    from t2i_jax.training.experiment import Experiment as Experiment
    from t2i_jax.training.experiment import Train as Train
    from t2i_jax.training.optimizer import Optimizer as Optimizer

_PUBLIC = {
    "api": "load train",
    "codecs.clusters": "ColorClusters",
    "codecs.dvae": "DVAE",
    "codecs.kl": "KL",
    "codecs.principal": "PrincipalCodes",
    "codecs.taesd": "TAESD",
    "codecs.vqgan": "VQGAN",
    "core.errors": "ConfigError DataError",
    "core.family": "with_fields",
    "data.pipeline": "Data",
    "data.sources": "ArrayRecord Folder Mixture Parquet TarShards Tfds",
    "edits": "Blend InitImage Inpaint Vary",
    "guides": "Autoguidance ClassifierGuidance Reference",
    "heads": "DiffusionHead FlowHead MixtureHead SoftmaxHead",
    "models.any_order": "AnyOrder",
    "models.ar": "AR",
    "models.clip": "CLIP",
    "models.coarse_to_fine": "CoarseToFine",
    "models.damsm": "DAMSM",
    "models.diffusion": "Diffusion",
    "models.gan": "GAN",
    "models.masked": "Masked",
    "models.staged_gan": "StagedGAN",
    "models.stream": "Stream",
    "models.unclip": "UnCLIP",
    "models.var": "VAR",
    "models.vq_diffusion": "VQDiffusion",
    "networks.clip": "CLIPTowers",
    "networks.condition": "CaptionEncoder ClassEmbedder Conditioning CrossAttnFeatures PooledFeatures SentenceAndWords"
    " TextFeatures",
    "networks.dit": "DiT",
    "networks.imagen": "AttentionPooledFeatures",
    "networks.local": "LocalTransformer",
    "networks.neighbours": "NeighbourMaps",
    "networks.one_stage": "OneStage",
    "networks.one_way": "OneWay",
    "networks.staged_generator": "StagedGenerator",
    "networks.prior": "EmbeddingPrior",
    "networks.unclip": "CaptionAndTokens ImageAndCaption NoisedImageAndTokens Similarity",
    "networks.unet": "UNet",
    "nn.lora": "LoRA",
    "nn.positions": "AxialPositions LearnedPositions RotaryPositions SinCosPositions",
    "nn.transformer": "Transformer",
    "noise.processes": "Discrete EDM Flow",
    "core.sharding": "Mesh=MeshConfig",
    "core.types": "Compute",
    "pipeline": "Pipeline",
    "presets": "PRESETS preset",
    "text.clip": "ClipCaption ClipEmbedding ClipText",
    "text.damsm": "CaptionWords DamsmText",
    "text.minilm": "MiniLM",
    "text.retrieval": "NeighbourPairs Neighbours",
    "text.sentencepiece": "SentencePiece",
    "text.t5": "T5",
    "training.experiment": "Experiment Train",
    "training.optimizer": "Optimizer",
}
"""Public names by module; `public=name` where it has another name there."""

_WHERE = {
    public: (f"t2i_jax.{module}", name or public)
    for module, names in _PUBLIC.items()
    for public, _, name in (word.partition("=") for word in names.split())
}

__version__ = "0.1.0"
__all__ = ["__version__", *sorted(_WHERE)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:  # of this module: names are imported when they are used (PEP 562)
    if name not in _WHERE:
        raise AttributeError(f"module 't2i_jax' has no attribute '{name}'")
    module, there = _WHERE[name]
    value = globals()[name] = getattr(importlib.import_module(module), there)  # by a name of the table above
    return value


def __dir__() -> list[str]:
    return __all__
