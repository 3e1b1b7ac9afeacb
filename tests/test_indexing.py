"""`t2i data index`, and indexing in a run: progress counts as work, mistakes are one line."""

import contextlib
import dataclasses
import re
import time

import pytest

from t2i_jax.cli import main
from t2i_jax.data import TarShards, tar_index
from t2i_jax.data.files import reporting
from t2i_jax.training import loop
from t2i_jax.training.watch import STATUS, watchdog
from tests.fixtures import toys
from tests.fixtures.commands import refused
from tests.fixtures.tars import image, indexes, plain, write

pytestmark = pytest.mark.usefixtures("user_cache")


def words(capsys):
    return " ".join(capsys.readouterr().err.split())


def test_the_command_completes_indexes(tmp_path, capsys):
    for k in range(3):
        write(tmp_path / f"{k}.tar", plain())
    main(["data", "index", str(tmp_path), "--workers", "2"])
    said = words(capsys)
    assert re.search(r"3 tar files, 12 samples, [\d.]+ s, [\d.]+ bytes a sample$", said)
    size = sum(file.stat().st_size for file in indexes(tmp_path))
    assert f"{size / 12:.1f} bytes a sample" in said
    (tmp_path / "more").mkdir()
    write(tmp_path / "more" / "9.tar", plain(1))
    main(["data", "index", str(tmp_path / "?.tar"), str(tmp_path / "0.tar"), str(tmp_path / "more" / "9.tar")])
    assert "4 tar files, 13 samples" in words(capsys)


def test_broken_tars_are_named_and_counted(tmp_path, capsys):
    """The others are indexed all the same."""
    for k in range(4):
        write(tmp_path / f"{k}.tar", plain())
    data = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(data[: len(data) // 2])
    (tmp_path / "2.tar").write_bytes(b"<!DOCTYPE html><html>404</html>")
    write(tmp_path / "3.tar", [("0.npy", b"x")])
    for _ in range(2):  # the second time by the indexes
        said = refused(capsys, "data", "index", tmp_path)
        lines = said.splitlines()
        assert "1.tar: the tar file is cut short or damaged after 4 samples" in lines[0]
        assert "2.tar: no tar file: it is a web page" in lines[1]
        assert "4 tar files, 7 samples" in lines[2] and len(lines) == 4
        assert lines[3] == "t2i data: 2 of 4 tar files are broken; they are named above"
    assert len(TarShards(str(tmp_path), truncated="skip").open()) == 7


@pytest.mark.parametrize(
    ("paths", "says"),
    [
        ([], "name tar files, folders of them or globs"),
        (["nowhere"], "nowhere: there is no such file or folder"),
        (["shards", "nowhere/*.tar"], "there is no such file or folder"),
        (["empty"], "the folder holds no *.tar file"),
        (["gs://bucket/shards"], "mount the bucket"),
        (["shards", "--workers", "-1"], "workers -1"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, paths, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "empty").mkdir()
    write(tmp_path / "shards" / "0.tar", plain())
    said = refused(capsys, "data", "index", *paths)
    assert says in said and said.count("\n") == 1 and not (tmp_path / "shards" / tar_index.FOLDER).exists()


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["data", "index", "--help"])
    assert stop.value.code == 0 and "t2i data index data/shards" in capsys.readouterr().out


# --- in a run ---------------------------------------------------------------------------------------------------------


def slowly(monkeypatch, seconds):
    scan = tar_index.scan
    monkeypatch.setattr(tar_index, "scan", lambda *a: time.sleep(seconds) or scan(*a))


def test_indexing_is_work_for_the_watchdog(tmp_path, monkeypatch):
    """It may take longer than the limit, as long as each tar takes less; without progress the process ends."""
    for k in range(8):
        write(tmp_path / f"{k}.tar", plain())
    slowly(monkeypatch, 0.3)
    ended = []
    with watchdog(1.5, ended.append) as heartbeat, reporting(heartbeat):
        assert len(TarShards(str(tmp_path)).open()) == 32
    assert not ended
    slowly(monkeypatch, 2.5)
    write(tmp_path / "9.tar", plain())
    with watchdog(1.5, ended.append) as heartbeat, reporting(heartbeat):
        TarShards(str(tmp_path)).open()
    assert ended == [STATUS]


@dataclasses.dataclass(frozen=True)
class Shards(toys.Numbers):
    """Numbers, after tar files were opened."""

    path: str = ""

    def batches(self, *args, **more):
        TarShards(self.path).open()
        return super().batches(*args, **more)


def test_a_run_tells_its_watchdog_of_indexing(tmp_path, monkeypatch):
    write(tmp_path / "0.tar", [("0.png", image(1))])
    beats = []

    @contextlib.contextmanager
    def watching(limit):
        with watchdog(limit) as heartbeat:
            yield lambda what: beats.append(what) or heartbeat(what)

    monkeypatch.setattr(loop, "watchdog", watching)
    loop.train(toys.experiment(data=Shards(path=str(tmp_path)), steps=2), tmp_path / "run")
    assert beats[0] == f"the index of {tmp_path}/0.tar" and "step 2" in beats
