"""The README: its table of systems has those of the field's comparison, what it names is there, its programs run."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from t2i_jax.codecs.autoencoder import AutoencoderConfig
from t2i_jax.codecs.quantize import QuantizerConfig
from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.convert import formats
from t2i_jax.core.family import with_fields
from t2i_jax.data import write_records
from t2i_jax.models.ar import AR
from t2i_jax.networks.condition import CaptionEncoder, Conditioning
from t2i_jax.presets import PRESETS
from t2i_jax.storage.artifacts import Artifact, save_artifact
from t2i_jax.text.sentencepiece import SentencePiece, train_vocabulary
from t2i_jax.training.experiment import load_experiment

HOME = Path(__file__).parent.parent
TABLE = (HOME / "README.md").read_text().split("<!-- papers -->")[1].split("<!-- /papers -->")[0]
ROWS = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in TABLE.strip().split("\n")[2:]}
SYSTEMS = (
    "GLIDE", "DALL-E 2", "Imagen", "Re-Imagen", "KNN-Diffusion", "Stable Diffusion", "DALL-E", "CogView", "CogView2",
    "Parti", "StackGAN++", "AttnGAN", "DM-GAN", "DF-GAN", "SSA-GAN", "Image GPT", "CLIP-GEN", "VQ-Diffusion", "MAR",
    "MaskGIT", "VAR", "Muse",
)  # fmt: skip


def named(cell):
    """The names in a cell; a dash: there are none."""
    found = re.findall(r"`([^`]+)`", cell)
    assert found or cell.strip() == "-", cell
    return found


def test_every_system_of_the_comparison_has_its_row():
    assert set(SYSTEMS) <= ROWS.keys()
    for name, (_, *cells, note) in ROWS.items():
        if not any(map(named, cells)):
            assert note.strip(), f"{name}: nothing of it is named, and the note does not say why"


def test_presets_and_formats_of_the_table_are_there():
    known = formats()
    for _, (_, _, presets, those, _) in ROWS.items():
        assert set(named(presets)) <= PRESETS.keys() and set(named(those)) <= known.keys()


@pytest.mark.parametrize("name", sorted({name for row in ROWS.values() for name in named(row[1])}))
def test_configs_of_the_table_can_be_built(name):
    experiment = load_experiment(HOME / "configs" / f"{name}.py")
    assert experiment.model.objectives()


# -- its programs

CODES = {"vocabulary": 512, "grid": (8, 8)}


def quickstart(folder: Path) -> None:
    """What the README's programs read: a model as that of the quickstart, but small and untrained, and codes."""
    captions = [f"an emoji of {thing} {n}" for n, thing in enumerate(("pizza", "red heart", "a cat") * 40)]
    train_vocabulary(captions, folder / "words.model", 300)
    parts = AutoencoderConfig(8, (1, 1, 1, 1), blocks=1, latent=4, attention=(), middle_attention=False, groups=4)
    codec = VQGAN(parts, QuantizerConfig(512, 4), perceptual=0.0, adversarial=0.0)
    save_artifact(Artifact(codec, jax.jit(codec.init)(jax.random.key(0))), folder / "codec", "# A codec\n")
    words = CaptionEncoder(300, 32, 16, 1, 2)
    model = with_fields(AR(**CODES, conditioning=Conditioning(words)), width=16, depth=1, heads=2)
    text = SentencePiece(str(folder / "words.model"), length=32)
    weights = jax.jit(model.init)(jax.random.key(1))
    kept = Artifact(model, weights, text=text, codec=str(folder / "codec"), image_size=64)
    save_artifact(kept, folder / "runs" / "quickstart" / "model", "# A model\n")
    rng = np.random.default_rng(0)
    rows = [{"codes": rng.integers(0, 512, (8, 8)).astype(np.int32), "label": n % 10, "key": str(n)} for n in range(96)]
    rows = [row | {"split": "train" if n < 64 else "val"} for n, row in enumerate(rows)]
    write_records(folder / "data" / "codes", rows)


def test_programs_of_the_readme_run(tmp_path, monkeypatch):
    """In turn and in one namespace, as a reader would; of the training of a thousand steps one is taken."""
    quickstart(tmp_path)
    monkeypatch.chdir(tmp_path)
    programs = re.findall(r"^```python\n(.*?)^```", (HOME / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(programs) >= 2
    names = {"mask": np.arange(64)[:, None] >= np.full((64, 64), 32)}
    for program in programs:
        exec(re.sub(r"steps=\d+", "steps=1", program), names)
    assert names["images"].shape == (1, 64, 64, 3) and names["images"].dtype == np.uint8
    assert (tmp_path / "runs" / "mine" / "config.json").exists()
