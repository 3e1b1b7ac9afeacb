"""Published adapters of a converted model, as adapters of this library, and back."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from t2i_jax import convert
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.outputs import write_json
from t2i_jax.core.params import abstract, axes_of, named
from t2i_jax.core.types import Trainable
from t2i_jax.interop import tensorfile
from t2i_jax.interop.lora import Change, read_changes, written
from t2i_jax.interop.names import Fields, Source, Table, arrays_to_theirs
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.networks.unet import UNet
from t2i_jax.nn.layers import LowRank
from t2i_jax.nn.lora import LoRA
from t2i_jax.storage.adapters import Adapter
from t2i_jax.storage.hub import readable

log = logging.getLogger(__name__)
FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""Names of the file in a folder that PEFT or diffusers wrote."""


def read_published(path: str | Path, format: str, config: Trainable) -> Adapter:
    """Adapters under published names, for the model `config` whose weights are of that format.

    path: a file, or a folder as PEFT and diffusers write it, whose settings say alpha. Matrices that are one here give
    one adapter of the summed ranks. Errors: `ConfigError` for what is no such file, or of another model.
    """
    path = readable(path)
    file = next((path / name for name in FILES if (path / name).exists()), path)
    alpha: Callable[[str], float | None] = lambda _: None
    try:
        content = tensorfile.content(file)
        if not isinstance(content, tensorfile.SafeTensors):
            raise ValueError(f"{file}: a safetensors file is wanted")
        if (settings := path / "adapter_config.json").exists():
            alpha = _alpha(json.loads(settings.read_text()))
        elif said := content.metadata.get("lora_adapter_metadata"):  # of diffusers, for each part of its pipeline
            parts = {re.sub(r"^(unet|transformer)\.", "", k): v for k, v in json.loads(said).items()}
            alpha = _alpha(parts) if "lora_alpha" in parts else alpha
        lines = _lines(config, format)
        changes, text = read_changes(
            content, {module for _, _, _, modules in lines for module in modules}, alpha, str(file)
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(str(error)) from error
    if text:
        log.warning(f"{file}: {text} tensors adapt the text encoder, which is frozen here; they are left out")
    return _adapter(config, lines, changes)


def _alpha(settings: Fields) -> Callable[[str], float]:
    """The alpha of each module by the settings of PEFT's `LoraConfig`."""
    patterns = settings.get("alpha_pattern") or {}
    root = math.sqrt(settings["r"]) if settings.get("use_rslora") else 1.0

    def of(module: str) -> float:
        own = (alpha for pattern, alpha in patterns.items() if re.search(rf"(^|\.)({pattern})$", module))
        return root * next(own, settings["lora_alpha"])

    return of


Line = tuple[str, int, Source, tuple[str, ...]]
"""Name of a variable, its layer, the line of its table, and the modules that its weights are of."""


def _lines(config: Trainable, format: str) -> list[Line]:
    """The lines of matrices and kernels."""
    table: Table = convert.find(format).table(config)
    found: list[Line] = []
    for name, v in named(abstract(config)).items():
        line, axes = table.get(name), axes_of(v)
        if line is None or len(axes) not in (2, 4) or not all(n.endswith(".weight") for n in line.names):
            continue
        for n in range(v.shape[0] if line.stacked else 1):
            found.append((name, n, line, tuple(x.removesuffix(".weight") for x in line.layer(n))))
    return found


def _adapter(config: Trainable, lines: list[Line], changes: dict[str, Change]) -> Adapter:
    shapes = named(abstract(config))
    adapted = {name for name, _, _, modules in lines if changes.keys() & set(modules)}
    ranks = [sum(changes[m].rank for m in modules if m in changes) for name, _, _, modules in lines if name in adapted]
    rank = max(ranks)
    arrays: dict[str, np.ndarray] = {}
    for name in sorted(adapted):
        each = [(line, modules) for other, _, line, modules in lines if other == name]
        deltas = [_delta(line, modules, changes, shapes[name].shape) for line, modules in each]
        pairs = [factors(delta.reshape(-1, delta.shape[-1]), rank) for delta in deltas]
        stacked = each[0][0].stacked
        a, b = (np.stack(x) if stacked else x[0] for x in zip(*pairs, strict=True))
        arrays |= {f"{name}.a": a.reshape(*shapes[name].shape[:-1], rank), f"{name}.b": b}
    targets = tuple(f"^{re.escape(name)}$" for name in sorted(adapted))
    return Adapter(config, LoRA(rank, float(rank), targets), arrays)


def _delta(line: Source, modules: tuple[str, ...], changes: dict[str, Change], shape: tuple[int, ...]) -> np.ndarray:
    """What is added to one layer of a variable, in our layout."""
    parts = [np.array(x) for x in line.theirs(np.zeros(shape[1:] if line.stacked else shape, np.float32))]
    for n, module in enumerate(modules):
        if module in changes:
            weight = changes[module].weight()
            # A linear layer may be published as a convolution of single positions, or the other way round.
            fits = weight.shape if line.rows is not None and not line.parts else parts[n].shape
            parts[n] = weight.reshape(fits)
    return line.ours(parts)


def factors(delta: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A (d, r) and B (r, f) whose product is a matrix (d, f) of that rank, or of a lower one."""
    delta = delta.astype(np.float64)
    # Some more random combinations of its columns than its rank span them all, up to rounding (Halko et al. 2011).
    some = delta @ np.random.default_rng(0).normal(size=(delta.shape[1], min(rank + 8, *delta.shape)))
    basis = np.linalg.qr(some)[0]
    u, sizes, v = np.linalg.svd(basis.T @ delta, full_matrices=False)
    a, b = basis @ u[:, :rank], sizes[:rank, None] * v[:rank]
    missing = rank - a.shape[1]
    a, b = np.pad(a, ((0, 0), (0, missing))), np.pad(b, ((0, missing), (0, 0)))
    return a.astype(np.float32), b.astype(np.float32)


def to_published(adapter: Adapter, format: str, names: str) -> dict[str, np.ndarray]:
    """The tensors of an adapter under published names. names: `peft`, whose adapters have one rank, `diffusers` or
    `kohya`.

    Errors: `ConfigError` for arrays that were trained whole, which these files do not hold.
    """
    lines, shapes = _lines(adapter.config, format), named(abstract(adapter.config))
    adapted = {name.removesuffix(".a") for name in adapter.arrays if name.endswith(".a")}
    whole = [name for name in adapter.arrays if isinstance(shapes.get(name), nnx.Param)]
    if left := whole + sorted(adapted - {name for name, _, _, _ in lines}):
        raise ConfigError(f"such files hold adapters of matrices alone, not {', '.join(left[:4])}")
    of = lambda name: (jnp.asarray(adapter.arrays[f"{name}.{part}"], jnp.float32) for part in "ab")
    deltas = {name: adapter.lora.scale * np.asarray(LowRank.product(*of(name))) for name in adapted}
    weights = arrays_to_theirs(deltas, convert.find(format).table(adapter.config))
    ranks: dict[str, int] = {}
    for name, _, _, modules in lines:
        for module in modules if name in adapted else ():
            ranks[module] = ranks.get(module, 0) + adapter.lora.rank  # of a tensor that holds several matrices
    changes = {}
    for module in ranks:
        weight = weights[f"{module}.weight"]
        rank = max(ranks.values()) if names == "peft" else ranks[module]
        down, up = factors(weight.reshape(len(weight), -1).T, rank)
        kernel = weight.ndim == 4
        down = down.T.reshape(-1, *weight.shape[1:])
        changes[module] = Change(down, up.T[..., None, None] if kernel else up.T, 1.0)
    unet = isinstance(adapter.config, Diffusion) and isinstance(adapter.config.network, UNet)
    return written(changes, names, "unet" if unet else "transformer")


def write_published(adapter: Adapter, format: str, out: str | Path, names: str) -> None:
    """A file of adapters for other programs; with the names of PEFT a folder, with its settings."""
    out, tensors = Path(out), to_published(adapter, format, names)
    if out.exists():
        raise ConfigError(f"{out}: exists already; choose another name")
    if names != "peft":
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out, metadata={"format": "pt"})
        return
    out.mkdir(parents=True)
    save_file(tensors, out / FILES[0], metadata={"format": "pt"})
    modules = sorted({k.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for k in tensors})
    rank = {k: len(v) for k, v in tensors.items() if "lora_A" in k}
    r = max(rank.values())
    write_json(
        out / "adapter_config.json",
        {"peft_type": "LORA", "r": r, "lora_alpha": r, "target_modules": modules, "lora_dropout": 0.0, "bias": "none"},
    )
