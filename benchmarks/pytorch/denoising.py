"""A diffusion Transformer in eager PyTorch, and Euler's steps along a flow: a loop in Python, both branches of guidance
as one batch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax import Array

from benchmarks.pytorch import pytorch, tensor
from t2i_jax.core.fields import changed_fields, values
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.networks.dit import DiT
from t2i_jax.noise.processes import Flow
from t2i_jax.sampling.options import DiffusionSampler


class Denoiser:
    """A `Diffusion` along a flow whose `DiT` is modulated by the whole condition, as SiT, with the weights of `model`.

    Errors: those of this package.
    """

    def __init__(self, config: Diffusion, model: Any):
        torch = pytorch()
        if not isinstance(config, Diffusion):
            raise ValueError(f"the comparison in PyTorch is of a Diffusion, not of a {type(config).__name__}")
        plain = DiT()
        odd = [
            name
            for name, wrong in {
                "network": not isinstance(config.network, DiT),
                "process": not isinstance(config.process, Flow),
                "predicts": config.predicts != "velocity",
                "solver": config.solver != "euler",
            }.items()
            if wrong
        ]
        if not odd and isinstance(config.network, DiT):
            fields = ("whole", "shared", "positions", "learn_variance")
            wanted, given = values(plain) | {"learn_variance": False}, values(config.network)
            odd = [f"network.{f}" for f in fields if given[f] != wanted[f]]
            odd += ["network.conditioning.via"] * (config.network.via != plain.via)
            odd += ["network.compute.dtype"] * (config.compute.dtype != "float32")
            sizes = ("width", "depth", "heads", "mlp", "eps")
            alike = dataclasses.replace(plain.transformer, **{f: values(config.network.transformer)[f] for f in sizes})
            odd += [f"network.transformer.{f}" for f in changed_fields(alike, config.network.transformer)]
        if odd:
            raise ValueError(f"the comparison in PyTorch is of a DiT's velocities by Euler's steps: not {odd[0]}")
        network: Any = config.network
        self.torch, self.f, self.config, self.network = torch, torch.nn.functional, config, network
        self.model = model
        linear = lambda m: (tensor(np.asarray(m.w[...]).T), tensor(m.b[...]))
        self.embed, self.out, self.last = linear(model.embed), linear(model.out), linear(model.modulation)
        self.positions, self.time = (
            tensor(model.positions[...]),
            (linear(model.time.into), linear(model.time.out)),
        )

        def block(i: int) -> dict[str, Any]:
            b = jax.tree.map(lambda x: np.asarray(x[i]), model.blocks).image
            # Ours are sorted by head, each with its query, key and value.
            w, bias = np.asarray(b.attention.qkv.w[...]), np.asarray(b.attention.qkv.b[...])
            apart = (
                lambda x: x.reshape(*x.shape[:-1], network.transformer.heads, 3, -1).swapaxes(-3, -2).reshape(x.shape)
            )
            named = {"out": b.attention.out, "into": b.mlp.into, "down": b.mlp.out, "modulation": b.modulation}
            return {"qkv": (tensor(apart(w).T), tensor(apart(bias)))} | {k: linear(m) for k, m in named.items()}

        self.blocks = [block(i) for i in range(network.transformer.depth)]

    def sample(self, condition: Array, null: Array | None, options: DiffusionSampler, noise: Array) -> Any:
        """Images (b, c, i, j) from noise (b, i, j, c), a tensor; the network's summary of the
        condition (b, d), and of the null one, None without guidance."""
        torch = self.torch
        path = self.config.process.timesteps(options.steps, options.stride, options.spacing)
        times, sigma = (np.asarray(x).tolist() for x in (path.t, path.sigma))
        with torch.inference_mode():
            x = tensor(noise).permute(0, 3, 1, 2).contiguous()
            known = tensor(condition) if null is None else torch.cat([tensor(condition), tensor(null)])
            for i in range(int(options.steps)):
                t = torch.full((len(known),), times[i])
                v = self._velocity(x if null is None else torch.cat([x, x]), t, known)
                if null is not None:
                    real, null = v.chunk(2)
                    v = null + float(options.guidance) * (real - null)
                x = x + (sigma[i + 1] - sigma[i]) * v
            return x

    def _velocity(self, x: Any, t: Any, known: Any) -> Any:
        """x (r, c, i, j) at times (r,) with what is known (r, d)."""
        torch, f, c = self.torch, self.f, self.network
        shape = c.transformer
        p, (rows, columns) = c.patch, (side // c.patch for side in c.size)

        def modulate(x, shift, scale):
            return f.layer_norm(x, (shape.width,), eps=shape.eps) * (1 + scale[:, None]) + shift[:, None]

        half = c.frequency_dim // 2
        angles = t[:, None] * torch.exp(-math.log(10000.0) * torch.arange(half) / half)
        waves = torch.cat([angles.cos(), angles.sin()], -1)
        known = f.silu(f.linear(f.silu(f.linear(waves, *self.time[0])), *self.time[1]) + known)
        patches = x.view(len(x), c.channels, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        x = f.linear(patches, *self.embed) + self.positions
        for block in self.blocks:
            parts = f.linear(known, *block["modulation"]).chunk(6, 1)
            q, k, v = f.linear(modulate(x, *parts[:2]), *block["qkv"]).unflatten(-1, (3, shape.heads, -1)).unbind(2)
            y = f.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v)))
            x = x + parts[2][:, None] * f.linear(y.transpose(1, 2).flatten(-2), *block["out"])
            y = f.gelu(f.linear(modulate(x, *parts[3:5]), *block["into"]), approximate="tanh")
            x = x + parts[5][:, None] * f.linear(y, *block["down"])
        y = f.linear(modulate(x, *f.linear(known, *self.last).chunk(2, 1)), *self.out)
        y = y.view(len(x), rows, columns, p, p, c.channels).permute(0, 5, 1, 3, 2, 4)
        return y.reshape(len(x), c.channels, *c.size)
