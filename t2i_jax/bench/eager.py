"""The same decoding in eager PyTorch, written as published programs have it: to be compared with, and for nothing else.

A loop in Python; both branches of guidance as one batch; a static cache as long as the sequence, read whole under a
mask; top-k by `topk`, top-p by a sort, a multinomial draw.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import Array

from t2i_jax.models.ar import AR
from t2i_jax.nn.condition import Classes
from t2i_jax.nn.draw import Sampling


class Eager:
    """An `AR` on class labels, as LlamaGen has it (SwiGLU, RMSNorm, 2-D rotary positions), with the weights of `model`.

    Errors: ImportError without PyTorch; ValueError for a configuration of another kind.
    """

    def __init__(self, config: AR, model: Any):
        import torch  # pyright: ignore[reportMissingImports]

        plain = AR(condition=config.condition)
        kind = ("activation", "norm", "bias", "qk_norm", "reads", "tied", "output_bias", "unmasked", "positions")
        classes = isinstance(config.condition, Classes) and config.condition.null
        odd = [f for f in kind if getattr(config, f) != getattr(plain, f)] + ["condition"] * (not classes)
        if odd:
            raise ValueError(f"the comparison in PyTorch is of models on class labels as published: not {odd[0]}")
        tensor = lambda x: torch.from_numpy(np.array(x, np.float32))
        layer = config.layer
        n, m, h = layer.heads, layer.groups, layer.head
        self.torch, self.config = torch, config
        # Their matrices are (out, in), and columns of queries, keys and values stand apart.
        turned = lambda w: tensor(np.asarray(w[...]).T)

        def block(i: int) -> dict[str, Any]:
            b = jax.tree.map(lambda x: np.asarray(x[i]), model.blocks)
            columns = np.asarray(b.attention.qkv.w[...]).reshape(-1, m, n // m + 2, h)
            parts = (columns[:, :, :-2], columns[:, :, -2], columns[:, :, -1])
            qkv = np.concatenate([p.reshape(len(p), -1) for p in parts], 1)
            return {
                "qkv": tensor(qkv.T),
                "out": turned(b.attention.out.w),
                "gate": turned(b.mlp.gate.w),
                "into": turned(b.mlp.into.w),
                "down": turned(b.mlp.out.w),
                "norms": (tensor(b.attention_norm.w[...]), tensor(b.mlp_norm.w[...])),
            }

        self.blocks = [block(i) for i in range(config.depth)]
        self.norm, self.tokens = tensor(model.norm.w[...]), tensor(model.tokens.w[...])
        self.output = turned(model.output)
        rotary = config._rotary(1, 0, 1 + config.length)
        assert rotary is not None
        self.rotary = tuple(tensor(x) for x in rotary)
        self.classes = tensor(model.condition.table.w[...])
        """a vector a class, the last one for none"""

    def sample(self, labels: Array, options: Sampling, guided: bool = True) -> Any:
        """Codes (b, L) of classes (b,), as a tensor; guidance, temperature, top_k, top_p and greedy of the options."""
        torch, c = self.torch, self.config
        with torch.inference_mode():
            ids = torch.from_numpy(np.array(labels)).long()
            both = torch.cat([ids, torch.full_like(ids, len(self.classes) - 1)]) if guided else ids
            shape = (len(both), c.layer.groups, 1 + c.length, c.layer.head)
            caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in self.blocks]
            mask = torch.tril(torch.ones(1 + c.length, 1 + c.length, dtype=torch.bool))
            x, codes = self.classes[both][:, None], torch.zeros(len(ids), c.length, dtype=torch.long)
            for i in range(c.length):
                logits = self._forward(x, caches, mask[i : i + 1], i)
                if guided:
                    real, null = logits.chunk(2)
                    logits = null + (real - null) * float(options.guidance)
                codes[:, i] = self._draw(logits / max(float(options.temperature), 1e-5), options)
                x = self.tokens[codes[:, i]][:, None]
                x = torch.cat([x, x]) if guided else x
            return codes

    def _forward(self, x: Any, caches: Any, mask: Any, i: int) -> Any:
        """Logits (r, v) behind the token x (r, 1, d) at place i of the sequence."""
        torch, layer = self.torch, self.config.layer
        f = torch.nn.functional
        n, m, h = layer.heads, layer.groups, layer.head

        def norm(x, w):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + layer.eps) * w

        def rotate(x):
            even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
            cos, sin = (t[i] for t in self.rotary)
            return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

        for block, (keys, values) in zip(self.blocks, caches, strict=True):
            q, k, v = f.linear(norm(x, block["norms"][0]), block["qkv"]).split([n * h, m * h, m * h], -1)
            q, k, v = (y.unflatten(-1, (-1, h)).transpose(1, 2) for y in (q, k, v))
            keys[:, :, i : i + 1], values[:, :, i : i + 1] = rotate(k), v
            seen = (y.repeat_interleave(n // m, 1) if n > m else y for y in (keys, values))
            y = f.scaled_dot_product_attention(rotate(q), *seen, attn_mask=mask)
            x = x + f.linear(y.transpose(1, 2).flatten(-2), block["out"])
            y = norm(x, block["norms"][1])
            x = x + f.linear(f.silu(f.linear(y, block["gate"])) * f.linear(y, block["into"]), block["down"])
        return f.linear(norm(x[:, 0], self.norm), self.output)

    def _draw(self, logits: Any, options: Sampling) -> Any:
        torch = self.torch
        if options.greedy:
            return logits.argmax(-1)
        if int(options.top_k):
            least = torch.topk(logits, int(options.top_k))[0][:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if float(options.top_p) < 1:
            ordered, order = logits.sort(descending=True)
            above = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            logits = logits.masked_fill((above > float(options.top_p)).gather(1, order.argsort(-1)), -torch.inf)
        return torch.multinomial(logits.softmax(-1), 1)[:, 0]
