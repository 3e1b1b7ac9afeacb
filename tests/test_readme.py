"""The README's table of systems: it has those of the field's comparison, and what it names is there."""

import re
from pathlib import Path

import pytest

from t2i_jax.convert import formats
from t2i_jax.presets import PRESETS
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
