"""Metrics of runs as pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from t2i_jax.cli import main
from t2i_jax.training.curves import curves_of, plot_runs
from tests.fixtures.commands import refused

LINES = [
    {"step": 10, "loss": 2.0, "images_per_second": 3.0},
    {"step": 20, "loss": None, "images_per_second": 3.5},
    {"step": 20, "val/loss": 1.5, "val/bits": 4.0},
]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    lines = "".join(json.dumps(line) + "\n" for line in LINES) + '{"step": 30, "lo'  # a kill cut it short
    (tmp_path / "run" / "metrics.jsonl").write_text(lines)
    return tmp_path / "run"


def test_curves_are_the_lines_of_the_run(run):
    found = curves_of(run)
    assert found.keys() == {"step", "loss", "images_per_second", "val/loss", "val/bits"}
    np.testing.assert_array_equal(found["loss"][0], [10, 20])
    np.testing.assert_array_equal(found["loss"][1], [2.0, np.nan])
    np.testing.assert_array_equal(found["val/bits"][1], [4.0])


def test_a_panel_for_each_metric_of_any_run(run, tmp_path):
    assert plot_runs([run, run], tmp_path / "all.png") == ["loss", "bits"]
    assert plot_runs([run], tmp_path / "one.png", ["images_per_second"]) == ["images_per_second"]
    wide, one = (Image.open(tmp_path / name).size for name in ("all.png", "one.png"))
    assert wide[0] == 2 * one[0] and wide[1] == one[1]


def test_what_cannot_be_drawn_is_said(run, tmp_path, capsys):
    main(["plot", str(run)])
    assert "curves.png: loss, bits" in capsys.readouterr().out and (run / "curves.png").exists()
    main(["plot", str(run)])  # its own file is drawn anew
    (tmp_path / "foreign.png").write_bytes(b"somebody's own")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").write_text("")
    for arguments, said in (
        ([tmp_path], "has no metrics.jsonl"),
        ([tmp_path / "new"], "has no line yet"),
        ([run, "--metrics", "los"], "did you mean 'loss'"),
        ([run, "--out", tmp_path / "a.pdf"], "a plot is a .png file"),
        ([run, "--out", tmp_path / "foreign.png"], "was not made by this command"),
        ([], "runs"),
    ):
        assert said in refused(capsys, "plot", *arguments), arguments
