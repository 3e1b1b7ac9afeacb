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


STEPS: tuple[Step, ...] = (
    Step(  # 1 -> 2: standard terms
        modules={
            "t2i_jax.nn.heads": "t2i_jax.heads",
            "t2i_jax.nn.orders": "t2i_jax.sampling.orders",
            "t2i_jax.nn.dit": "t2i_jax.networks.dit",
            "t2i_jax.nn.unet": "t2i_jax.networks.unet",
            "t2i_jax.nn.condition": "t2i_jax.networks.condition",
            "t2i_jax.nn.padded": "t2i_jax.networks.glide_captions",
            "t2i_jax.parallel": "t2i_jax.core.sharding",
            "t2i_jax.training.checkpoints": "t2i_jax.storage.checkpoints",
        },
        classes={
            "t2i_jax.nn.condition:Classes": "t2i_jax.networks.condition:ClassEmbedder",
            "t2i_jax.nn.condition:Captions": "t2i_jax.networks.condition:CaptionEncoder",
            "t2i_jax.nn.condition:Features": "t2i_jax.networks.condition:TextFeatures",
            "t2i_jax.nn.condition:Vector": "t2i_jax.networks.condition:PooledFeatures",
            "t2i_jax.nn.condition:Encoded": "t2i_jax.networks.condition:CrossAttnFeatures",
            "t2i_jax.nn.condition:Paired": "t2i_jax.networks.condition:PooledAndTokenFeatures",
            "t2i_jax.nn.condition:Given": "t2i_jax.networks.condition:PrefixTokens",
            "t2i_jax.nn.padded:PaddedCaptions": "t2i_jax.networks.glide_captions:GlideCaptions",
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
