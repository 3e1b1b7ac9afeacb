"""Names of published low-rank adapters: of PEFT, of diffusers in its three generations, of Kohya's scripts."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import numpy as np

from t2i_jax.interop.names import Tensors

DOWN = r"(\.lora_A(\.default)?|\.lora_down|\.lora\.down|_lora\.down)\.weight$"
UP = r"(\.lora_B(\.default)?|\.lora_up|\.lora\.up|_lora\.up)\.weight$"
PREFIX = r"^(base_model\.model\.|unet\.|transformer\.|diffusion_model\.|lora_unet_|lora_transformer_)"
TEXT = r"^(text_encoder(_\d)?\.|lora_te\d?_|lora_prior_te_)"
OTHERS = {
    r"\.(dora_scale|lora_magnitude_vector)": "DoRA, whose matrices are rescaled too",
    r"\.hada_w": "LoHa, products of two low-rank matrices",
    r"\.lokr_w": "LoKr, Kronecker products",
    r"\.oft_|\.boft_": "OFT, rotations of matrices",
}
"""Kinds of adapters that are not low-rank sums."""


class Change(NamedTuple):
    """What an adapter adds to the weight of one module: scale x up x down."""

    down: np.ndarray
    """(r, d), or (r, c, k, k) of a convolution"""
    up: np.ndarray
    """(f, r), or (f, r, 1, 1)"""
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def weight(self) -> np.ndarray:
        """(f, d) or (f, c, k, k), float32."""
        up = self.up.astype(np.float32).reshape(len(self.up), self.rank)
        down = self.down.astype(np.float32)
        return self.scale * np.tensordot(up, down, 1)


def read_changes(
    tensors: Tensors,
    modules: Collection[str],
    alpha: Callable[[str], float | None] = lambda _: None,
    file: str = "the file",
) -> tuple[dict[str, Change], int]:
    """The changes of an adapter by the published name of each module, and how many tensors are of a text encoder.

    modules: the names that the model has. alpha: of a module that the file gives none for; None is its rank.
    Errors: ValueError for adapters of another kind, and for modules that the model has not.
    """
    for pattern, kind in OTHERS.items():
        if any(re.search(pattern, name) for name in tensors):
            raise ValueError(f"{file}: holds {kind}; low-rank sums (LoRA) are read")
    flat = {module.replace(".", "_"): module for module in modules}
    downs, ups, alphas, unknown, text = {}, {}, {}, [], 0
    for name, tensor in tensors.items():
        if re.search(TEXT, name):
            text += 1
            continue
        down, up = re.search(DOWN, name), re.search(UP, name)
        end = down or up
        stem = name[: end.start()] if end else name.removesuffix(".alpha")
        module = _module(stem, modules, flat)
        if module is None or not (end or name.endswith(".alpha")):
            unknown.append(name)
        elif end is None:
            alphas[module] = float(np.asarray(tensor).item())
        else:
            (downs if down else ups)[module] = np.asarray(tensor)
    unknown += [f"{module}: one of its two matrices alone" for module in downs.keys() ^ ups.keys()]
    if unknown or not downs:
        some = ", ".join(unknown[:4]) + (f" and {len(unknown) - 4} more" if len(unknown) > 4 else "")
        raise ValueError(f"{file}: no adapters of this model: {some or 'it has no lora_A nor lora_down'}")
    rank = {module: len(down) for module, down in downs.items()}
    scale = lambda module: alphas.get(module, alpha(module) or rank[module]) / rank[module]
    return {module: Change(down, ups[module], scale(module)) for module, down in downs.items()}, text


def _module(stem: str, modules: Collection[str], flat: Mapping[str, str]) -> str | None:
    """The name of the module that the name of an adapter begins with."""
    rest = stem.replace(".processor.", ".")
    while True:
        for name in (stem, rest, f"{rest}.0"):  # the first diffusers named `to_out.0` without its number
            if name in modules:
                return name
        if rest in flat:
            return flat[rest]
        shorter = re.sub(PREFIX, "", rest)
        if shorter == rest:
            return None
        rest = shorter


def written(changes: Mapping[str, Change], names: str, part: str) -> dict[str, np.ndarray]:
    """The tensors of a file of adapters. names: `peft`, `diffusers` or `kohya`; part: `unet` or `transformer`."""
    found: dict[str, np.ndarray] = {}
    for module, change in changes.items():
        down, up = change.down, change.scale * change.up
        if names == "kohya":
            stem = f"lora_{part}_{module.replace('.', '_')}"
            found |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            found[f"{stem}.alpha"] = np.asarray(float(change.rank))
        else:
            stem = f"{part}.{module}" if names == "diffusers" else f"base_model.model.{module}"
            found |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    return {k: np.asarray(v, np.float32, order="C") for k, v in found.items()}
