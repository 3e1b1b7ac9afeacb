"""`emoji-64-fast` of the zoo: a third of the network of `zoo.py`, three evaluations an image, without guidance.

t2i train configs/zoo_fast.py --run runs/zoo/emoji-64-fast
t2i release runs/zoo/emoji-64-fast --out t2i_jax/zoo/models/emoji-64-fast --int8
"""

from dataclasses import replace
from pathlib import Path

from t2i_jax.core.family import with_fields
from t2i_jax.presets import ADALN
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.training.experiment import load_experiment

large = load_experiment(Path(__file__).with_name("zoo.py"))
network = replace(large.model.network, transformer=replace(ADALN, width=128, depth=6, heads=4, qk_norm=True))
experiment = replace(
    large,
    model=with_fields(large.model, network=network, sampling=DiffusionSampler(steps=3, guidance=1.0)),
    codec="emoji-64/codec",
)
