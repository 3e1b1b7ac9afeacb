"""Migration of configs stored by earlier versions: plain JSON, converted before their classes are imported.

A stored config has a `version` next to its fields; the first version wrote none. `STEPS` has one entry per past
version, with everything that the next version renamed. To rename something, add a line to the last step if its version
is not released yet; else add a step, which increments the version.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

from t2i_jax.core.errors import ConfigError

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"
"""A result of `json.loads`."""
Object = dict[str, Json]


@dataclasses.dataclass(frozen=True)
class Step:
    """The differences between a version and the next one. Classes are written `module:Class`.

    Classes, fields and values on the left are those of the older version. Nested objects are migrated before the object
    that contains them; of an object first its values, then its fields, then its class, and last `rewrites`.
    """

    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """module or package: its new name; `classes` takes precedence for the classes it lists"""
    classes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """class: its new name"""
    fields: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    """class: field: its new name; "compute.remat" moves it into the config in the field `compute`, "" drops it"""
    parts: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    """class: field of the newer version: the newer class of the config that holds the fields moved into it"""
    values: Mapping[str, Mapping[str, Mapping[str, str]]] = dataclasses.field(default_factory=dict)
    """class: field: literal: its new spelling, also within a list of literals"""
    rewrites: Mapping[str, Callable[[Object], Object]] = dataclasses.field(default_factory=dict)
    """class: a function for what the tables cannot express; takes and returns an object of the newer version"""

    def __call__(self, value: Json) -> Json:
        """The value as the next version writes it. Errors: `ConfigError` if two fields would get the same name."""
        if isinstance(value, list):
            return [self(v) for v in value]
        if not isinstance(value, dict):
            return value
        made: Object = {k: self(v) for k, v in value.items()}
        kind = value.get("type")
        if not isinstance(kind, str):
            return made
        words, names, parts = self.values.get(kind, {}), self.fields.get(kind, {}), self.parts.get(kind, {})
        found: Object = {"type": self._renamed(kind)}
        for field, content in made.items():
            if field == "type":
                continue
            *path, name = names.get(field, field).split(".")
            inner = found
            for at, part in enumerate(path):
                whole = ".".join(path[: at + 1])
                new: Object = {"type": parts[whole]} if whole in parts else {}
                below = inner.setdefault(part, new)
                if not isinstance(below, dict):
                    raise ConfigError(f"{kind}: '{field}' belongs into '{whole}', which holds {below!r}")
                inner = below
            if name in inner and name != "type":
                raise ConfigError(f"{kind}: holds both '{field}' and '{name}', which are the same")
            if name:
                inner[name] = _respelled(content, words.get(field, {}))
        return self.rewrites[kind](found) if kind in self.rewrites else found

    def _renamed(self, kind: str) -> str:
        if kind in self.classes:
            return self.classes[kind]
        module, colon, name = kind.partition(":")
        for old in sorted(self.modules, key=len, reverse=True):
            if module == old or module.startswith(f"{old}."):
                return f"{self.modules[old]}{module[len(old) :]}{colon}{name}"
        return kind


def _respelled(value: Json, words: Mapping[str, str]) -> Json:
    if isinstance(value, list):
        return [_respelled(v, words) for v in value]
    return words.get(value, value) if isinstance(value, str) else value


# -- 2 -> 3

_SHAPE = {name: f"transformer.{name}" for name in ("width", "depth", "heads", "mlp", "dropout")} | {
    "dtype": "compute.dtype",
    "remat": "compute.remat",
    "kernel": "compute.attention",
    "loss_chunk": "compute.loss_chunk",
}
_CONDITION = {"condition": "conditioning.what", "condition_dropout": "conditioning.dropout"}
_PARTS = {
    "transformer": "t2i_jax.nn.transformer:Transformer",
    "conditioning": "t2i_jax.networks.condition:Conditioning",
    "compute": "t2i_jax.core.types:Compute",
}


def _part(config: Object, name: str) -> Object:
    """The part of that name, added if its fields were all left out. Errors: `ConfigError` if it is no object."""
    part = config.setdefault(name, {"type": _PARTS[name]})
    if not isinstance(part, dict):
        raise ConfigError(f"'{name}' holds {part!r}")
    return part


def _ar_positions(config: Object) -> Object:
    kind, count = config.pop("positions", "rotary"), config.pop("num_positions", 0)
    base, prefix = config.pop("rotary_base", 10000.0), config.pop("prefix_rotary", "identity")
    rotary: Object = {"type": "t2i_jax.nn.positions:RotaryPositions", "base": base, "prefix": prefix}
    learned: Object = {"type": "t2i_jax.nn.positions:LearnedPositions", "count": count}
    return {**config, "positions": rotary if kind == "rotary" else learned}


def _layer_norms(config: Object, **kind: Json) -> Object:
    """Blocks that always had LayerNorm and biases."""
    transformer = _part(config, "transformer")
    for name, value in ({"norm": "layer", "bias": True} | kind).items():
        transformer.setdefault(name, value)
    return config


def _stream_kind(config: Object) -> Object:
    return _layer_norms(config, activation="gelu", rope_values=config.get("positions") == "rotary")


def _dit_kind(config: Object) -> Object:
    return _layer_norms(config, activation="gelu_tanh", eps=1e-6)


def _masked_decoder(config: Object) -> Object:
    config = _layer_norms(config, activation="gelu", eps=1e-6)
    names = {f"decoder_{name}": name for name in ("width", "depth", "heads", "mlp")}
    own: Object = {new: config.pop(old) for old, new in names.items() if old in config}
    own = {name: value for name, value in own.items() if value}
    return {**config, "decoder": {**_part(config, "transformer"), **own}} if own else config


def _no_condition(config: Object) -> Object:
    conditioning = config.get("conditioning")
    none = isinstance(conditioning, dict) and conditioning.get("what", "") is None
    return {**config, "conditioning": None} if none else config


def _parts_of_network(config: Object) -> Object:
    """Fields that the network had, and the other way round."""
    dropout, network = config.pop("condition_dropout", 0.1), config.get("network")
    if not isinstance(network, dict):
        return config
    if isinstance(network.get("conditioning", {}), dict):
        _part(network, "conditioning")["dropout"] = dropout
    return _compute_of("network")(config)


def _compute_of(part: str) -> Callable[[Object], Object]:
    def rewrite(config: Object) -> Object:
        network = config.get(part)
        compute = network.pop("compute", None) if isinstance(network, dict) else None
        return config if compute is None else {**config, "compute": compute}

    return rewrite


# -- 3 -> 4


def _noised_clip(config: Object) -> Object:
    """`NoisedCLIP`, whose blocks were its own, is a `CLIP` with `noise`."""
    take = config.pop
    kind: Object = {"norm": "layer", "activation": "gelu", "bias": True, "key_bias": False}
    blocks = lambda width, depth, heads: {
        "type": _PARTS["transformer"],
        "width": width,
        "depth": depth,
        "heads": heads,
        **kind,
    }
    text = blocks(take("text_width", 512), take("text_depth", 12), take("text_heads", 8))
    image = blocks(take("image_width", 768), take("image_depth", 12), take("image_heads", 12))
    towers: Object = {"type": "t2i_jax.networks.clip:CLIPTowers", "text": text, "image": image, "last": True}
    defaults = {"vocabulary": 49408, "length": 77, "size": 64, "patch": 4, "dim": 512, "times": 1000}
    towers |= {name: take(name, value) for name, value in defaults.items()}
    cosine: Object = {"type": "t2i_jax.noise.processes:Discrete", "schedule": "cosine"}
    fixed: Object = {"learn_scale": False, "same": "none", "scale": take("scale", 100.0)}
    fixed |= {"noise": take("process", cosine), "towers": towers}
    return {**config, **fixed}


FIELDS: list[Json] = ["image", "label", "codes", "low_codes", "latents", "image_features", "features", "text_mask"]
"""Default of `Data.fields`."""


def _all_fields(data: Object) -> Object:
    """Earlier defaults of `Data.fields` lack names of fields that came later."""
    fields = data.get("fields")
    earlier = [[f for f in FIELDS if f not in new] for new in (("low_codes", "image_features"), ("image_features",))]
    return {**data, "fields": FIELDS} if fields in earlier else data


STEPS: tuple[Step, ...] = (
    Step(  # 1 -> 2: standard terms
        modules={
            "t2i_jax.nn.heads": "t2i_jax.heads",
            "t2i_jax.nn.orders": "t2i_jax.sampling.orders",
        },
        classes={
            "t2i_jax.nn.condition:Classes": "t2i_jax.nn.condition:ClassEmbedder",
            "t2i_jax.nn.condition:Captions": "t2i_jax.nn.condition:CaptionEncoder",
            "t2i_jax.nn.condition:Features": "t2i_jax.nn.condition:TextFeatures",
            "t2i_jax.nn.condition:Vector": "t2i_jax.nn.condition:PooledFeatures",
            "t2i_jax.nn.condition:Encoded": "t2i_jax.nn.condition:CrossAttnFeatures",
            "t2i_jax.nn.condition:Paired": "t2i_jax.nn.condition:PooledAndTokenFeatures",
            "t2i_jax.nn.condition:Given": "t2i_jax.nn.condition:PrefixTokens",
            "t2i_jax.nn.padded:PaddedCaptions": "t2i_jax.nn.padded:GlideCaptions",
            "t2i_jax.nn.heads.softmax:Softmax": "t2i_jax.heads.softmax:SoftmaxHead",
            "t2i_jax.nn.heads.diffusion:Diffusion": "t2i_jax.heads.diffusion:DiffusionHead",
            "t2i_jax.nn.heads.flow:Flow": "t2i_jax.heads.flow:FlowHead",
            "t2i_jax.nn.heads.mixture:Mixture": "t2i_jax.heads.mixture:MixtureHead",
            "t2i_jax.nn.draw:Sampling": "t2i_jax.sampling.options:ARSampler",
            "t2i_jax.nn.orders:Generation": "t2i_jax.sampling.options:MaskedSampler",
            "t2i_jax.models.diffusion:Solving": "t2i_jax.sampling.options:DiffusionSampler",
            "t2i_jax.noise.reverse:Reverse": "t2i_jax.sampling.options:DiscreteSampler",
            "t2i_jax.models.stream:Text": "t2i_jax.models.stream:StreamText",
            "t2i_jax.codecs.dvae:Pooled": "t2i_jax.codecs.dvae:OpenAIdVAE",
            "t2i_jax.codecs.dvae:Strided": "t2i_jax.codecs.dvae:DALLEPytorchVAE",
            "t2i_jax.comparison.plan:Line": "t2i_jax.comparison.plan:Variant",
        },
        fields={
            "t2i_jax.models.ar:AR": {
                "reads": "conditioning",
                "unmasked": "bidirectional_prefix",
                "position_rows": "num_positions",
            },
            "t2i_jax.models.stream:Stream": {
                "sandwich": "sandwich_norm",
                "relax": "pb_relax",
                "branch_scale": "layer_scale",
                "shift": "token_shift",
            },
            "t2i_jax.models.masked:Masked": {"buckets": "size_buckets"},
            "t2i_jax.models.diffusion:Diffusion": {
                "spare_half": "discard_variance_output",
                "bound_weight": "vlb_weight",
                "enlarges": "upscale",
                "augmentation": "noise_aug",
            },
            "t2i_jax.models.diffusion:Solving": {"pull": "classifier_scale", "augmentation": "noise_aug"},
            "t2i_jax.models.vq_diffusion:VQDiffusion": {"auxiliary": "aux_loss_weight"},
            "t2i_jax.nn.dit:DiT": {"waves": "frequency_dim"},
            "t2i_jax.nn.unet:UNet": {"told_noise": "noise_aug_conditioning"},
            "t2i_jax.noise.discrete:Chain": {"kept": "alpha_bar", "masked": "gamma_bar"},
            "t2i_jax.noise.processes:Flow": {"bound": "max_steps"},
            "t2i_jax.noise.processes:EDM": {"bound": "max_steps"},
            "t2i_jax.comparison.plan:Line": {"pulled_by": "classifier"},
            "t2i_jax.training.experiment:Train": {"players": "optimizers"},
            "t2i_jax.nn.transformer:Layer": {
                "turn_values": "rope_values",
                "memory": "context",
                "sandwich": "sandwich_norm",
                "branch_scale": "layer_scale",
                "relax": "pb_relax",
            },
        },
        values={
            "t2i_jax.models.ar:AR": {"reads": {"memory": "cross_attention"}},
            "t2i_jax.models.vq_diffusion:VQDiffusion": {"times": {"waves": "sinusoidal"}},
        },
    ),
    Step(  # 2 -> 3: parts of a family are configs, and packages
        modules={
            "t2i_jax.nn.dit": "t2i_jax.networks.dit",
            "t2i_jax.nn.unet": "t2i_jax.networks.unet",
            "t2i_jax.nn.condition": "t2i_jax.networks.condition",
            "t2i_jax.nn.padded": "t2i_jax.networks.glide_captions",
            "t2i_jax.parallel": "t2i_jax.core.sharding",
            "t2i_jax.training.checkpoints": "t2i_jax.storage.checkpoints",
        },
        fields={
            "t2i_jax.models.ar:AR": _SHAPE
            | _CONDITION
            | {"conditioning": "conditioning.via"}
            | {k: f"transformer.{k}" for k in ("kv_heads", "activation", "norm", "eps", "bias", "qk_norm")},
            "t2i_jax.models.stream:Stream": _SHAPE
            | {k: f"transformer.{k}" for k in ("head_dim", "activation", "bias", "qkv_bias", "out_bias")}
            | {k: f"transformer.{k}" for k in ("sandwich_norm", "pb_relax", "layer_scale")},
            "t2i_jax.models.masked:Masked": _SHAPE | _CONDITION | {"eps": "transformer.eps"},
            "t2i_jax.models.any_order:AnyOrder": _SHAPE | _CONDITION | {"qk_norm": "transformer.qk_norm"},
            "t2i_jax.models.vq_diffusion:VQDiffusion": _SHAPE
            | _CONDITION
            | {"activation": "transformer.activation", "position_grid": "positions.grid"},
            "t2i_jax.nn.dit:DiT": _SHAPE
            | {"condition": "conditioning.what", "text": "conditioning.via", "hidden": "transformer.mlp"}
            | {"eps": "transformer.eps", "qk_norm": "transformer.qk_norm", "stretch": "positions.stretch"},
            "t2i_jax.nn.unet:UNet": {
                "condition": "conditioning.what",
                "dtype": "compute.dtype",
                "remat": "compute.remat",
            },
        },
        parts={
            "t2i_jax.models.ar:AR": _PARTS,
            "t2i_jax.models.stream:Stream": _PARTS,
            "t2i_jax.models.masked:Masked": _PARTS,
            "t2i_jax.models.any_order:AnyOrder": _PARTS,
            "t2i_jax.models.vq_diffusion:VQDiffusion": _PARTS | {"positions": "t2i_jax.nn.positions:AxialPositions"},
            "t2i_jax.nn.dit:DiT": _PARTS | {"positions": "t2i_jax.nn.positions:SinCosPositions"},
            "t2i_jax.nn.unet:UNet": _PARTS,
        },
        values={
            "t2i_jax.models.ar:AR": {"conditioning": {"prefix": "default"}},
            "t2i_jax.nn.dit:DiT": {"text": {"modulate": "default", "cross": "cross_attention"}},
        },
        rewrites={
            "t2i_jax.models.ar:AR": _ar_positions,
            "t2i_jax.models.stream:Stream": _stream_kind,
            "t2i_jax.models.masked:Masked": _masked_decoder,
            "t2i_jax.models.vq_diffusion:VQDiffusion": _layer_norms,
            "t2i_jax.nn.dit:DiT": _dit_kind,
            "t2i_jax.nn.unet:UNet": _no_condition,
            "t2i_jax.models.diffusion:Diffusion": _parts_of_network,
            "t2i_jax.models.noised_classifier:NoisedClassifier": _compute_of("trunk"),
        },
    ),
    Step(  # 3 -> 4: one CLIP, with or without noise
        classes={"t2i_jax.models.noised_clip:NoisedCLIP": "t2i_jax.models.clip:CLIP"},
        rewrites={
            "t2i_jax.models.noised_clip:NoisedCLIP": _noised_clip,
            "t2i_jax.data.pipeline:Data": _all_fields,
        },
    ),
)
"""Steps from version n to n + 1, starting with version 1."""


def migrated(content: Object, steps: tuple[Step, ...] = STEPS) -> Object:
    """The content of a stored file as this version writes it, without its `version`.

    Errors: `ConfigError` for a file of a newer version, and for a version that is not a number.
    """
    content = dict(content)
    version, newest = content.pop("version", 1), len(steps) + 1
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ConfigError(f"version {version!r}: it is a whole number, 1 to {newest}")
    if version > newest:
        raise ConfigError(
            f"was written by a newer t2i_jax, in version {version} of its configs; this one reads up to {newest}: "
            "upgrade the library"
        )
    for step in steps[version - 1 :]:
        made = step(content)
        assert isinstance(made, dict)
        content = made
    return content


VERSION = len(STEPS) + 1
"""Version of the configs that are written now."""
