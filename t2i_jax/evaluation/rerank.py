"""The best of several candidates, judged by CLIP (Ramesh et al. 2021, section 2.6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from t2i_jax.core import image_files as files
from t2i_jax.core.sharding import MeshConfig, batch_sharding, put_on_mesh, shardings, to_host
from t2i_jax.data.images import open_image
from t2i_jax.evaluation.features import batches
from t2i_jax.networks.clip import CLIPNetwork
from t2i_jax.text.clip import ClipEmbedding


class Reranker:
    """CLIP's similarity of images and prompts.

    text: a CLIP with both towers; batch_size: images of a batch. Errors: those of `ClipEmbedding.load`.
    """

    def __init__(self, text: ClipEmbedding, mesh: MeshConfig = MeshConfig(), batch_size: int = 32):
        self.text, self.mesh = text, mesh.build()
        model = text.load()
        self.model = put_on_mesh(model, shardings(model, self.mesh))
        split = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        self.batch_size = -(-batch_size // split) * split
        self._read = jax.jit(lambda model, ids, mask: text.features(model, ids, mask)[:, 0])
        self._look = jax.jit(self._embed)

    def _embed(self, model: CLIPNetwork, images: Array) -> Array:
        return self.text.image_features(model, images.astype(jnp.float32) / 127.5 - 1)[:, 0]

    def __call__(self, prompts: Sequence[str], samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 (n, m, i, j, 3), m for each of n prompts -> their order int (n, m), best first, and scores
        float (n, m), the cosines of image and prompt. Ties keep their order.

        Errors: ValueError for another shape or dtype.
        """
        n = len(prompts)
        if samples.dtype != np.uint8 or samples.ndim != 5 or len(samples) != n:
            raise ValueError(
                f"images are uint8 (n, m, i, j, 3) for n = {n} prompts, not {samples.dtype} {samples.shape}"
            )
        read = self._batched(self._read, *self.text(list(prompts)))
        seen = self._batched(self._look, samples.reshape(-1, *samples.shape[2:])).reshape(n, -1, read.shape[-1])
        scores = np.einsum("nk,nmk->nm", read, seen)
        return np.argsort(-scores, axis=1, kind="stable"), scores

    def _batched(self, function: Callable[..., Array], *arrays: np.ndarray) -> np.ndarray:
        """`function` over rows, a batch at a time."""
        found = []
        with jax.set_mesh(self.mesh):
            for rows, count in batches(len(arrays[0]), self.batch_size):
                some = put_on_mesh([a[rows] for a in arrays], batch_sharding(self.mesh))
                found.append(to_host(function(self.model, *some))[:count])
        return np.concatenate(found)


def keep_best(
    paths: Sequence[Path], prompts: Sequence[str], count: int, out: Path, rerank: Reranker, scale: int = 4
) -> None:
    """Of the PNG files at `paths`, as many for each prompt and prompt by prompt, the best `count` into `out`.

    They are numbered prompt by prompt, best first; each PNG stores its score and its earlier metadata. grid.png shows
    the first 64. Images of an earlier call move to a folder of their own. Errors: `ConfigError` where a file is in the
    way that this command did not make.
    """
    each = len(paths) // len(prompts)
    best, captions, notes = [], [], []
    for n, prompt in enumerate(prompts):
        own = paths[n * each : (n + 1) * each]
        images = np.stack([np.asarray(open_image(path)) for path in own])
        order, scores = rerank([prompt], images[None])
        for i in order[0, :count]:
            about = {k: v for k, v in files.read_png_text(own[i]).items() if k not in ("Description", "Software")}
            best.append(images[i])
            captions.append(prompt)
            notes.append(about | {"score": f"{scores[0, i]:.4f}"})
    kept = [out / f"{i:05d}.png" for i in range(len(best))]
    files.claim(kept, notes, ("grid.png",))
    for path, image, prompt, about in zip(kept, best, captions, notes, strict=True):
        files.save_png(image, path, [prompt], about)
    files.describe(kept, notes)
    sheet = files.grid(np.stack(best[:64]), captions[:64], columns=count if count > 1 else 0, scale=scale)
    files.save_png(sheet, out / "grid.png")
