"""Next-token prediction in eager PyTorch: a loop in Python, both branches of guidance as one batch, a static cache as
long as the sequence, read whole under a mask, top-k by `topk`, top-p by a sort, a multinomial draw; and a train step.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import Array

from benchmarks.pytorch import pytorch, tensor
from t2i_jax.core.fields import changed_fields, values
from t2i_jax.core.types import Compute
from t2i_jax.models.ar import AR
from t2i_jax.networks.condition import ClassEmbedder
from t2i_jax.nn.transformer import Transformer
from t2i_jax.sampling.options import ARSampler


class Decoder:
    """An `AR` on class labels, as LlamaGen has it (SwiGLU, RMSNorm, 2-D rotary positions), with the weights of `model`.

    Errors: those of this package.
    """

    def __init__(self, config: AR, model: Any):
        torch = pytorch()
        if not isinstance(config, AR):
            raise ValueError(f"the comparison in PyTorch is of an AR, not of a {type(config).__name__}")
        classes = config.conditioning.what
        shape = config.transformer
        same = ("width", "depth", "heads", "kv_heads", "head_dim", "mlp", "eps", "dropout")
        llama = Transformer(**{name: values(shape)[name] for name in same})
        kind = ("tied", "output_bias", "bidirectional_prefix", "positions", "corruption", "label_smoothing", "z_loss")
        wanted, given = values(AR()), values(config)
        odd = [name for name in kind if given[name] != wanted[name]]
        odd += [f"transformer.{name}" for name in changed_fields(llama, shape)]
        odd += [
            f"compute.{name}" for name in ("dtype", "remat") if values(config.compute)[name] != values(Compute())[name]
        ]
        odd += ["conditioning"] * (
            config.is_cross_attended or not isinstance(classes, ClassEmbedder) or not classes.null
        )
        if odd:
            raise ValueError(f"the comparison in PyTorch is of models on class labels as published: not {odd[0]}")
        n, m, h = shape.heads, shape.num_kv_heads, shape.head_size
        self.torch, self.config = torch, config
        # Their matrices are (out, in), and columns of queries, keys and values are separate.
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
                "attention_norm": tensor(b.attention_norm.w[...]),
                "mlp_norm": tensor(b.mlp_norm.w[...]),
            }

        self.blocks = [block(i) for i in range(shape.depth)]
        self.norm, self.tokens = tensor(model.norm.w[...]), tensor(model.tokens.w[...])
        self.output = turned(model.output)
        rotary = model.rotary(1, 0, 1 + config.length)
        assert rotary is not None
        self.rotary = tuple(tensor(x) for x in rotary)
        self.classes = tensor(model.condition.table.w[...])
        """a vector a class, the last one for none"""

    def sample(self, labels: Array, options: ARSampler, guided: bool = True) -> Any:
        """Codes (b, L) of classes (b,), as a tensor; guidance, temperature, top_k, top_p and greedy of the options."""
        torch, c = self.torch, self.config
        with torch.inference_mode():
            ids = torch.from_numpy(np.array(labels)).long()
            both = torch.cat([ids, torch.full_like(ids, len(self.classes) - 1)]) if guided else ids
            shape = (len(both), c.transformer.num_kv_heads, 1 + c.length, c.transformer.head_size)
            caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in self.blocks]
            mask = torch.tril(torch.ones(1 + c.length, 1 + c.length, dtype=torch.bool))
            x, codes = self.classes[both][:, None], torch.zeros(len(ids), c.length, dtype=torch.long)
            for i in range(c.length):
                logits = self._forward(x, i, caches, mask[i : i + 1])[:, 0]
                if guided:
                    real, null = logits.chunk(2)
                    logits = null + (real - null) * float(options.guidance)
                codes[:, i] = self._draw(logits / max(float(options.temperature), 1e-5), options)
                x = self.tokens[codes[:, i]][:, None]
                x = torch.cat([x, x]) if guided else x
            return codes

    def loss(self, labels: Any, codes: Any) -> Any:
        """Mean cross-entropy of codes (b, L) of classes (b,), integer tensors; with dropout, as in training."""
        torch, c = self.torch, self.config
        null = torch.rand(len(labels)) < c.conditioning.dropout
        first = self.classes[torch.where(null, len(self.classes) - 1, labels)]
        x = torch.cat([first[:, None], self.tokens[codes[:, :-1]]], 1)
        logits = self._forward(torch.nn.functional.dropout(x, c.token_dropout), dropout=c.transformer.dropout)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten())

    def _forward(self, x: Any, start: int = 0, caches: Any = None, mask: Any = None, dropout: float = 0.0) -> Any:
        """Logits (r, t, v) that follow the tokens x (r, t, d), from position `start` on; the caches hold earlier ones.

        Without caches x is the whole sequence, each of which sees those before it.
        """
        torch, shape = self.torch, self.config.transformer
        f = torch.nn.functional
        n, m, h = shape.heads, shape.num_kv_heads, shape.head_size
        stop = start + x.shape[1]

        def norm(x, w):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + shape.eps) * w

        def rotate(x):
            even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
            cos, sin = (t[start:stop] for t in self.rotary)
            return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

        for i, block in enumerate(self.blocks):
            q, k, v = f.linear(norm(x, block["attention_norm"]), block["qkv"]).split([n * h, m * h, m * h], -1)
            q, k, v = (y.unflatten(-1, (-1, h)).transpose(1, 2) for y in (q, k, v))
            k = rotate(k)
            if caches is not None:
                keys, values = caches[i]
                keys[:, :, start:stop], values[:, :, start:stop] = k, v
                k, v = keys, values
            seen = (y.repeat_interleave(n // m, 1) if n > m else y for y in (k, v))
            y = f.scaled_dot_product_attention(rotate(q), *seen, attn_mask=mask, is_causal=mask is None)
            x = x + f.dropout(f.linear(y.transpose(1, 2).flatten(-2), block["out"]), dropout)
            y = norm(x, block["mlp_norm"])
            y = f.linear(f.silu(f.linear(y, block["gate"])) * f.linear(y, block["into"]), block["down"])
            x = x + f.dropout(y, dropout)
        return f.linear(norm(x, self.norm), self.output)

    def _draw(self, logits: Any, options: ARSampler) -> Any:
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


class Training:
    """A train step of a `Decoder`: AdamW on gradients cut to norm 1, and with `ema` an average of the parameters."""

    def __init__(self, decoder: Decoder, learning_rate: float = 3e-4, ema: float = 0.0):
        torch = decoder.torch
        self.decoder, self.ema = decoder, ema
        weights = [decoder.classes, decoder.tokens, decoder.norm, decoder.output]
        self.weights = [w.requires_grad_() for w in (*weights, *(w for b in decoder.blocks for w in b.values()))]
        self.average = [w.detach().clone() for w in self.weights] if ema else []
        self.optimizer = torch.optim.AdamW(self.weights, learning_rate, betas=(0.9, 0.95), weight_decay=0.05)

    def step(self, labels: Array, codes: Array) -> float:
        """One update by codes (b, h, w) of classes (b,): the loss before it."""
        torch = self.decoder.torch
        label, code = (torch.from_numpy(np.array(x)).long() for x in (labels, codes))
        self.optimizer.zero_grad()
        loss = self.decoder.loss(label, code.flatten(1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        if self.ema:
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.weights, 1 - self.ema)
        return loss.item()
