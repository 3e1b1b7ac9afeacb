"""The metrics of families, from what they are asked to the report."""

import io

import jax
import numpy as np
import pytest
from PIL import Image

from t2i_jax.core.conditions import TextSpec
from t2i_jax.core.config import write_stored
from t2i_jax.core.errors import ConfigError, DataError
from t2i_jax.core.family import with_fields
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.data import ArrayRecord, Data, write_records
from t2i_jax.evaluation.features import FeatureNetwork
from t2i_jax.evaluation.matching import Matching
from t2i_jax.evaluation.run import evaluate_family, records_of, reference_data
from t2i_jax.models.ar import AR
from t2i_jax.networks.condition import CaptionEncoder, ClassEmbedder
from t2i_jax.pipeline import Pipeline
from t2i_jax.storage.artifacts import Artifact, save_artifact
from t2i_jax.training.experiment import Experiment
from tests.fixtures import toys
from tests.fixtures.families import fresh

SPLITS = ("train", "test", "test_combo")


def as_png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


class Letters:
    """Letters of a caption as numbers."""

    spec = TextSpec()

    def __call__(self, captions):
        ids = np.asarray([[ord(c) % 20 for c in caption[:5].ljust(5)] for caption in captions], np.int32)
        return ids, np.ones(ids.shape, bool)


def data(folder, captions=True, broken=(4,), splits=("train", "test")):
    rng = np.random.default_rng(0)
    records = [
        {
            "image": as_png(rng.integers(0, 256, (8, 8, 3), np.uint8)),
            **({"captions": [f"{split} {n}"], "unseen_caption": f"new {split} {n}"} if captions else {}),
            "label": n % 3,
            "key": f"{split}{n}",
            "split": split,
        }
        for split in splits
        for n in range(9)
    ]
    for n in broken:  # these are left out
        records[n]["image"] = b"no image"
    write_records(folder, records)
    return Data(ArrayRecord(str(folder)), image_size=8, broken_share=1.0)


@pytest.mark.parametrize(
    "condition",
    [ClassEmbedder(3), CaptionEncoder(20, 5, width=16, depth=1, heads=2), ClassEmbedder(0)],
    ids=["class", "caption", "nothing"],
)
def test_a_family_is_asked_by_what_it_reads_also_for_likelihood(condition, tmp_path):
    family = with_fields(AR(), vocabulary=8, grid=(2, 2), width=16, depth=1, heads=2, condition=condition, dropout=0.0)
    model = jax.jit(family.init)(jax.random.key(0))
    text = None if isinstance(condition, ClassEmbedder) else Letters()
    asked = "label" in condition.batch_spec()
    pipeline = Pipeline.place(family, model, Artifact(toys.Squares(), {}), text, MeshConfig(1))
    reference = data(tmp_path / "records", text is not None, splits=SPLITS)
    spaces = [FeatureNetwork("pixels").load()]
    matching = None
    if text is not None:
        dots = lambda images: images.reshape(len(images), -1)[:, :5].astype(np.float32)
        matching = Matching(dots, lambda captions: text(captions)[0].astype(np.float32))
    report = evaluate_family(pipeline, reference, tmp_path, spaces, 8, 8, 0, family.options(), False, matching, 3)
    measured = {k.split("/", 1)[1] for k in report.numbers if "matching" in k}
    assert measured == ({"matching/r_precision", "matching/cosine"} if matching else set())
    names = {"known classes"} if asked else {"new words", "new concepts", "new combinations"}
    assert {k.split("/")[0] for k in report.numbers} == names | {"noises"}
    assert 1 <= report.numbers["noises/pixels@16/distinct"].value <= 3 and (tmp_path / "noises.png").exists()
    bits = [n.value for k, n in report.numbers.items() if k.endswith("bits_per_token")]
    assert len(bits) == len(names) and all(0 < b < 10 for b in bits)
    assert report.facts["images"] == dict.fromkeys(names, 8)
    assert (tmp_path / "samples.png").exists()


@pytest.mark.parametrize(("count", "broken"), [(3, ()), (9, range(6))])
def test_too_few_images_are_said_before_any_is_drawn(count, broken, tmp_path):
    family = with_fields(AR(), vocabulary=8, grid=(2, 2), width=16, depth=1, heads=2, condition=ClassEmbedder(0))
    reference = data(tmp_path / "records", broken=broken)
    pipeline = Pipeline.place(family, family.init(jax.random.key(0)), Artifact(toys.Squares(), {}), None, MeshConfig(1))
    with pytest.raises(ConfigError, match=r"(new words|training images): 3 can be used.* at least 4"):
        evaluate_family(pipeline, reference, tmp_path, [], count, 8, 0, family.options(), False)


def test_images_to_compare_with_are_a_config_s_or_a_data_set(tmp_path):
    own = data(tmp_path / "records", splits=SPLITS)
    family = with_fields(AR(), vocabulary=8, grid=(2, 2), width=16, depth=1, heads=2, condition=ClassEmbedder(0))
    save_artifact(Artifact(family, fresh(family), image_size=16), tmp_path / "model", "# a model\n")
    found = reference_data(str(tmp_path / "records"), tmp_path / "model")
    assert found.image_size == 16 and len(records_of(found, "test", 3)) == 3
    write_stored(tmp_path / "config.json", Experiment(family, own))
    assert reference_data(str(tmp_path / "config.json"), tmp_path / "model") == own
    with pytest.raises(DataError, match="no such file"):
        reference_data("./none", tmp_path / "model")
