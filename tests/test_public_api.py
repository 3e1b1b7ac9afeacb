"""The public face: what `import t2i_jax` gives, and what it costs."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import t2i_jax as t2i
from t2i_jax.storage.artifacts import Artifact, save_artifact
from tests.fixtures import toys

NAMES = {
    "AxialPositions",
    "Compute",
    "Conditioning",
    "LearnedPositions",
    "LoRA",
    "PRESETS",
    "RotaryPositions",
    "SinCosPositions",
    "Transformer",
    "preset",
    "with_fields",
    "AR",
    "AnyOrder",
    "ArrayRecord",
    "AttentionPooledFeatures",
    "Autoguidance",
    "Blend",
    "CaptionEncoder",
    "CaptionWords",
    "CLIP",
    "CLIPTowers",
    "ClassEmbedder",
    "ClassifierGuidance",
    "Reference",
    "ClipEmbedding",
    "ClipText",
    "CoarseToFine",
    "ColorClusters",
    "CaptionAndTokens",
    "ClipCaption",
    "EmbeddingPrior",
    "ImageAndCaption",
    "UnCLIP",
    "ConfigError",
    "CrossAttnFeatures",
    "DAMSM",
    "DVAE",
    "DamsmText",
    "Data",
    "DataError",
    "DiT",
    "Diffusion",
    "DiffusionHead",
    "Discrete",
    "EDM",
    "Experiment",
    "Flow",
    "FlowHead",
    "Folder",
    "GAN",
    "InitImage",
    "Inpaint",
    "KL",
    "LocalTransformer",
    "Masked",
    "Mesh",
    "MiniLM",
    "Mixture",
    "MixtureHead",
    "NeighbourMaps",
    "NeighbourPairs",
    "Neighbours",
    "OneStage",
    "OneWay",
    "Optimizer",
    "Parquet",
    "Pipeline",
    "NoisedImageAndTokens",
    "PooledFeatures",
    "PrincipalCodes",
    "Similarity",
    "SentenceAndWords",
    "SentencePiece",
    "SoftmaxHead",
    "StagedGAN",
    "StagedGenerator",
    "Stream",
    "T5",
    "TAESD",
    "TarShards",
    "TextFeatures",
    "Tfds",
    "Train",
    "UNet",
    "VAR",
    "VQDiffusion",
    "Vary",
    "VQGAN",
    "load",
    "train",
}


def test_the_public_names_are_these():
    assert t2i.__all__ == ["__version__", *sorted(NAMES)] and dir(t2i) == sorted(t2i.__all__)
    for name in NAMES:
        assert getattr(t2i, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'Stable'"):
        t2i.Stable  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_type_checkers_see_the_same_names():
    block = next(n for n in ast.parse(Path(t2i.__file__).read_text()).body if isinstance(n, ast.If))
    seen = {a.asname: (n.module, a.name) for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert seen == t2i._WHERE


@pytest.mark.parametrize("program", ["import t2i_jax; dir(t2i_jax)", "import sys, t2i_jax.cli as c; sys.argv=['t2i']"])
def test_importing_it_imports_no_jax(program):
    program += "; import sys; assert not {'jax', 'flax', 'numpy'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_help_answers_within_a_second_of_work():
    program = "import sys, time; sys.argv = ['t2i', '--help']\nimport t2i_jax.cli as c\n"
    program += "try: c.main()\nexcept SystemExit: print(time.process_time(), file=sys.stderr)"
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "t2i sample" in made.stdout and float(made.stderr) < 1


def test_a_model_is_trained_loaded_and_called(tmp_path):
    save_artifact(Artifact(toys.Squares(), {}), tmp_path / "codec", "# Squares\n")
    experiment = toys.experiment(toys.Histogram(), toys.Labels(), steps=2)
    t2i.train(dataclasses.replace(experiment, codec=str(tmp_path / "codec")), tmp_path / "run")
    pipe = t2i.load(tmp_path / "run")
    images = pipe("0", seeds=[0, 1])
    assert images.dtype == np.uint8 and len(images) == 2
    np.testing.assert_array_equal(images, pipe.sample(["0", "0"], [0, 1]))
    np.testing.assert_array_equal(pipe([0]), images[:1])
    with pytest.raises(t2i.ConfigError, match="no sampling option 'temprature'; did you mean 'temperature'"):
        pipe("0", temprature=3)
