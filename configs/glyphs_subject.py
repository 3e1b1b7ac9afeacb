"""A subject as adapters (DreamBooth; Ruiz et al. 2023, arXiv:2208.12242): a few pictures of it, and images of its kind.

    t2i data build glyphs --out data/glyphs_line --size 64 --styles openmoji-line
    python configs/glyphs_subject.py data/glyphs_line data/subject
    t2i sample twemoji-64 "a cat" "a cat face" --prompts configs/twemoji_prompts.txt --count 2 --out data/kind
    t2i train configs/glyphs_subject.py --run runs/glyphs/subject
    t2i sample twemoji-64 "a zwx cat" "a cat" --lora runs/glyphs/subject

The subject is a cat of ten line drawings, called by a word that captions do not have. Three of four examples are what
the base draws, for cats and for other prompts (prior preservation), so that these stay what they were. docs/finetune.md
has what came of it, and of the same without these.
"""

import sys
from pathlib import Path

from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import Folder, Mixture
from t2i_jax.nn.lora import LoRA
from t2i_jax.storage.artifacts import open_artifact
from t2i_jax.text.minilm import MiniLM
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer

BASE = "twemoji-64"

experiment = Experiment(
    model=open_artifact(BASE).artifact.config,
    data=Data(
        Mixture((Folder("data/subject"), Folder("data/kind", ("metadata:prompt",))), weights=(0.25, 0.75)),
        image_size=64,
        batch_size=16,
    ),
    train=Train(
        start=BASE,
        lora=LoRA(rank=8, alpha=16.0),
        steps=400,
        optimizer=Optimizer("adamw", 2e-3, warmup=20, weight_decay=0.0),
        evaluate_every=0,
        preview_every=0,
        save_every=100,
    ),
    codec=f"{BASE}/codec",
    text=MiniLM(16, pooled=True),
)


def write_subject(data: str, out: str, most: int = 10) -> None:
    """The cats among the line drawings, as a folder of pictures with captions."""
    from PIL import Image

    from t2i_jax.data.sources import ArrayRecord

    examples = Data(ArrayRecord(data), image_size=64).examples("train")
    cats = [r for r in map(examples.__getitem__, range(len(examples))) if "cat" in r["label_text"].split()][:most]
    Path(out).mkdir(parents=True)
    for n, record in enumerate(cats):
        Image.fromarray(record["image"]).save(Path(out) / f"{n}.png")
        (Path(out) / f"{n}.txt").write_text("a zwx cat\n")


if __name__ == "__main__":
    write_subject(*sys.argv[1:])
