"""Indexes of tar files: one for each, made once, by several processes, and never wrong for another tar."""

import io
import os
import pickle
import signal
import stat
import subprocess
import sys
import tarfile
import textwrap

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from t2i_jax.core.tar_scan import scan
from t2i_jax.data import TarShards, tar_index, write_records
from t2i_jax.data.files import reporting
from t2i_jax.data.tar_index import FOLDER, Table, encode_table, index_tars, open_table
from tests.fixtures.tars import expected, image, indexes, plain, samples, write

pytestmark = pytest.mark.usefixtures("user_cache")


def scanned(monkeypatch):
    """The names of the tar files that this process scans from now on."""
    seen = []
    monkeypatch.setattr(tar_index, "scan", lambda path, *a: seen.append(path.name) or scan(path, *a))
    return seen


def test_each_tar_is_scanned_once(tmp_path, monkeypatch):
    seen = scanned(monkeypatch)
    for k in range(3):
        write(tmp_path / f"{k}.tar", plain())
    first = samples(TarShards(str(tmp_path)))
    assert first == 3 * expected() and seen == ["0.tar", "1.tar", "2.tar"]
    assert samples(TarShards(str(tmp_path))) == first and len(seen) == 3
    write(tmp_path / "05.tar", plain(1))  # one more, between the others
    assert samples(TarShards(str(tmp_path))) == expected() + expected(1) + 2 * expected() and seen[3:] == ["05.tar"]
    write(tmp_path / "1.tar", plain(2))
    assert samples(TarShards(str(tmp_path))) == expected() + expected(1) + expected(2) + expected()
    assert seen[4:] == ["1.tar"] and len(indexes(tmp_path)) == 4  # the index of the tar before is gone
    assert samples(TarShards(str(tmp_path / "1.tar"))) == expected(2) and len(seen) == 5


def test_a_tar_of_the_same_size_with_another_time_is_scanned_again(tmp_path, monkeypatch):
    source = write(tmp_path / "a.tar", plain(key="a{}"))
    source.open()
    write(tmp_path / "a.tar", plain(key="b{}"))
    os.utime(tmp_path / "a.tar", ns=(1, 10**18))
    assert samples(source) == expected(key="b{}")


@pytest.mark.parametrize("workers", [2, 3])
def test_processes_find_what_one_finds(tmp_path, workers):
    for k in range(7):
        write(tmp_path / f"{k}.tar", plain(k + 1))
    (tmp_path / "cut.tar").write_bytes((tmp_path / "6.tar").read_bytes()[:-11_000])
    shards = sorted(tmp_path.glob("*.tar"))
    found = index_tars(shards, workers)
    several = {tar.name: open_table(entry).data[:] for tar, entry in found.items()}
    for file in indexes(tmp_path):
        file.unlink()
    one = {tar.name: open_table(entry).data[:] for tar, entry in index_tars(shards, 1).items()}
    assert one == several and len(one) == 8
    assert [e.tar.name for e in found.values() if not e.whole] == ["cut.tar"]


def test_workers_do_not_import_jax_nor_the_program(tmp_path):
    """A program without a guard against its own import, as of a notebook, indexes with processes."""
    for k in range(4):
        write(tmp_path / f"{k}.tar", plain())
    code = f"""
        import sys
        from pathlib import Path
        from t2i_jax.data.tar_index import _Process, index_tars
        print("once")
        entries = index_tars(sorted(Path({str(tmp_path)!r}).glob("*.tar")), 2)
        print(sum(e.samples for e in entries.values()))
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(code))
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["once", "16"], done.stderr
    code = "import sys, t2i_jax.core.tar_scan; sys.exit(any(n in sys.modules for n in ('jax', 'grain', 'PIL')))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_what_is_indexed_is_kept_when_the_work_ends_early(tmp_path, monkeypatch):
    for k in range(6):
        write(tmp_path / f"{k}.tar", plain())
    count = 0

    def seen(tar, entry):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt

    for workers in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            index_tars(sorted(tmp_path.glob("*.tar")), workers, seen)
        count = 0
        assert len(indexes(tmp_path)) == 3
    again = scanned(monkeypatch)
    assert len(TarShards(str(tmp_path)).open()) == 24 and len(again) == 3


def test_a_kill_loses_only_the_tars_at_work(tmp_path):
    for k in range(60):
        write(tmp_path / f"{k:02}.tar", plain())
    code = f"""
        import os, signal, sys
        from pathlib import Path
        from t2i_jax.data.tar_index import index_tars
        kept = []
        def seen(tar, entry):
            kept.append(tar)
            if len(kept) == 20:
                os.kill(os.getpid(), signal.SIGKILL)
        index_tars(sorted(Path({str(tmp_path)!r}).glob("*.tar")), 2, seen)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    names = [file.name for file in indexes(tmp_path)]
    assert len(names) == 20 and not any(name.startswith(tar_index.NEW) for name in names)
    assert len(TarShards(str(tmp_path)).open()) == 240


def test_several_processes_at_once(tmp_path):
    """They share the work, and none reads what another has not finished."""
    for k in range(40):
        write(tmp_path / f"{k:02}.tar", plain(k % 5 + 1))
    code = f"from t2i_jax.data import TarShards; print(len(TarShards({str(tmp_path)!r}).open()))"
    programs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [p.communicate(timeout=200)[0].strip() for p in programs] == ["120"] * 3
    assert len(indexes(tmp_path)) == 40


def test_a_tar_that_another_process_indexed_meanwhile_is_left_out(tmp_path, monkeypatch):
    for k in range(4):
        write(tmp_path / f"{k}.tar", plain())
    clock = iter(range(0, 10**6, 100))  # so each look at the folder is long past
    monkeypatch.setattr(tar_index.time, "monotonic", lambda: next(clock))
    seen = scanned(monkeypatch)
    shards = sorted(tmp_path.glob("*.tar"))

    def other(tar, entry):
        if tar.name == "1.tar":
            index_tars(shards[2:3], 1)

    found = index_tars(shards, 1, other)
    assert seen == ["0.tar", "1.tar", "2.tar", "3.tar"] and [e.samples for e in found.values()] == [4] * 4


def test_a_worker_that_dies_names_the_tar(tmp_path, monkeypatch):
    for k in range(4):
        write(tmp_path / f"{k}.tar", plain())
    start = tar_index._Process._start
    dead = []

    def dying(self):
        program = start(self)
        if not dead:
            dead.append(program)
            program.kill()
            program.wait()
        return program

    monkeypatch.setattr(tar_index._Process, "_start", dying)
    faults = []
    index_tars(sorted(tmp_path.glob("*.tar")), 2, lambda tar, e: faults.append(str(e)) if e is not None else None)
    (fault,) = [f for f in faults if "the process that scanned it ended" in f]
    assert ".tar: the process that scanned it ended with status -9" in fault and len(faults) == 4
    assert len(TarShards(str(tmp_path)).open()) == 16


# --- where it lies ----------------------------------------------------------------------------------------------------


def test_the_index_can_be_read_by_all_who_read_the_shards(tmp_path):
    write(tmp_path / "a.tar", plain())
    os.chmod(tmp_path / "a.tar", 0o644)
    os.chmod(tmp_path, 0o777)
    mask = os.umask(0o077)
    try:
        TarShards(str(tmp_path)).open()
    finally:
        os.umask(mask)
    assert stat.S_IMODE(indexes(tmp_path)[0].stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / FOLDER).stat().st_mode) == 0o777


def test_folders_that_cannot_be_written(tmp_path, user_cache, monkeypatch, caplog):
    """The cache takes the index, else it stays in memory, for worker processes too."""
    source = write(tmp_path / "a.tar", plain())
    (tmp_path / FOLDER).write_bytes(b"")  # no folder can be made here
    assert samples(source) == expected()
    (kept,) = (user_cache / "t2i_jax" / "tars").glob("*/a.tar.*")
    seen = scanned(monkeypatch)
    assert samples(source) == expected() and not seen
    kept.unlink()
    kept.parent.rmdir()
    kept.parent.write_bytes(b"")
    data = pickle.dumps(source.open())
    reader = pickle.loads(data)
    assert len(seen) == 1 and reader[2]["captions"] == ["a dog 2"] and "stays in memory" in caplog.text


def test_two_folders_with_tars_of_one_name(tmp_path):
    for name, count in (("a", 2), ("b", 3)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "0.tar", plain(count))
    assert samples(TarShards(str(tmp_path / "*" / "0.tar"))) == expected(2) + expected(3)
    assert len(indexes(tmp_path / "a")) == len(indexes(tmp_path / "b")) == 1


@pytest.mark.parametrize("name", ["a.b.c.1.tar", "café Zürich.tar", "x" * 240 + ".tar", "UPPER.TAR", "-1-2.3"])
def test_names_of_tars(tmp_path, name, monkeypatch):
    source = write(tmp_path / name, plain())
    assert samples(source) == expected()
    seen = scanned(monkeypatch)
    assert samples(source) == expected() and not seen


def test_the_index_of_earlier_versions_is_removed(tmp_path):
    old = tmp_path / ".members-0123456789abcdef.npy"
    np.save(old, np.zeros((4, 10), np.int64))
    assert samples(write(tmp_path / "a.tar", plain())) == expected() and not old.exists()


# --- what is in it ----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["cut", "foreign", "zeros"]))
@example(2460, "zeros")  # within the last columns
def test_a_damaged_index_is_made_again(tmp_path_factory, at, how):
    folder = tmp_path_factory.mktemp("tars")
    source = write(folder / "a.tar", plain())
    assert samples(source) == expected()
    (index,) = indexes(folder)
    data = index.read_bytes()
    if how == "foreign":
        np.save(index.open("wb"), np.zeros((at % 5, at % 4)))
    else:
        index.write_bytes(data[: at % len(data)] + (bytes(len(data) - at % len(data)) if how == "zeros" else b""))
    assert samples(source) == expected()
    assert index.read_bytes() == data or how == "zeros"


def test_an_index_of_another_tar_is_not_believed(tmp_path):
    sources = [write(tmp_path / f"{name}.tar", plain(n)) for name, n in (("a", 4), ("b", 2))]
    assert [len(s.open()) for s in sources] == [4, 2]
    a, b = indexes(tmp_path)
    a.write_bytes(b.read_bytes())
    assert samples(sources[0]) == expected()


numbers = st.lists(st.integers(-(2**62), 2**62), min_size=3, max_size=3)


@given(st.dictionaries(st.text("abc_", min_size=1), numbers | st.lists(st.integers(-9, 300), min_size=3, max_size=3)))
def test_columns_are_what_was_written(columns):
    columns |= {"image": [1, 2, 3]}
    table = Table(encode_table({"size": 2048}, {name: np.array(x) for name, x in columns.items()}))
    assert {name: table.column(name).tolist() for name in table.columns} == columns
    assert {name: [table.value(name, i) for i in range(3)] for name in table.columns} == columns


def test_columns_of_later_versions(tmp_path, monkeypatch):
    """A column that is not known is kept and not read; one that is missing is made, and the others stay."""
    source = write(tmp_path / "a.tar", plain())
    assert samples(source) == expected()
    (file,) = indexes(tmp_path)
    table = Table(file.read_bytes())
    columns = {name: table.column(name) for name in table.columns}
    about = {k: table.header[k] for k in ("size", "mtime_ns")}
    seen = scanned(monkeypatch)
    file.write_bytes(encode_table(about, columns | {"width": np.arange(4) * 300}))
    assert samples(source) == expected() and not seen
    del columns["txt_size"]
    file.write_bytes(encode_table(about, columns | {"width": np.arange(4) * 300}))
    assert samples(source) == expected() and len(seen) == 1
    assert samples(source) == expected() and len(seen) == 1
    assert Table(file.read_bytes()).column("width").tolist() == [0, 300, 600, 900]


@pytest.mark.parametrize("order", ["by sample", "by kind"])
def test_bytes_a_sample(tmp_path, order):
    """At most 32, also where images have any size and the members of a sample lie far from each other."""
    rng = np.random.default_rng(0)
    members = []
    for i in range(400):
        sizes = {"jpg": int(rng.integers(10**3, 10**5)), "txt": 40 + i % 50, "json": 300 + i, "cls": 1 + i % 3}
        members += [(f"{i:05d}.{end}", bytes(size)) for end, size in sizes.items()]
    if order == "by kind":
        members.sort(key=lambda m: m[0][-3:])
    assert len(write(tmp_path / "a.tar", members).open()) == 400
    (file,) = indexes(tmp_path)
    assert file.stat().st_size <= 32 * 400


def test_offsets_beyond_four_gigabytes(tmp_path):
    """A member of 5 GB without a byte on disk lies between two samples."""
    path = tmp_path / "a.tar"
    write(path, plain(1))
    with open(path, "r+b") as file:
        with tarfile.open(path) as tar:
            end = max(m.offset_data + -(-m.size // 512) * 512 for m in tar)
        file.seek(end)
        file.truncate()
        large = tarfile.TarInfo("large.bin")
        large.size = 5 * 2**30
        file.write(large.tobuf())
        file.seek(large.size, os.SEEK_CUR)
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, data in list(plain(2))[3:]:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        file.write(buffer.getvalue())
    assert samples(TarShards(str(path))) == expected(2)


# --- reports and limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_indexing_reports_each_tar(tmp_path, workers):
    for k in range(3):
        write(tmp_path / f"{k}.tar", plain())
    said = []
    with reporting(said.append):
        index_tars(sorted(tmp_path.glob("*.tar")), workers)
    assert sorted(said) == [f"the index of {tmp_path}/{k}.tar" for k in range(3)]
    index_tars(sorted(tmp_path.glob("*.tar")), workers)
    assert len(said) == 3


def test_a_long_scan_reports_while_it_runs(tmp_path, monkeypatch):
    from t2i_jax.core import tar_scan

    write(tmp_path / "a.tar", plain())
    clock = iter(range(0, 10**6, 2))
    monkeypatch.setattr(tar_scan.time, "monotonic", lambda: next(clock))
    said = []
    scan(tmp_path / "a.tar", {".png"}, said.append)
    assert said == list(range(1, 13))


@pytest.mark.parametrize("workers", [0, 1])
def test_few_descriptors_are_enough(tmp_path, workers):
    """300 shards of each kind with a limit of 64 open files, by threads and by a worker process."""
    members = list(plain(1))
    for k in range(300):
        write(tmp_path / f"{k:03}.tar", members)
    write_records(tmp_path / "r", [{"image": image(1), "captions": ["a dog"]} for _ in range(300)], shards=300)
    code = f"""
        import os, resource
        from t2i_jax.data import ArrayRecord, Data, Mixture, TarShards
        if __name__ == "__main__":
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            source = Mixture((TarShards({str(tmp_path)!r}), ArrayRecord({str(tmp_path / "r")!r})))
            data = Data(source, image_size=8, batch_size=50, workers={workers}, threads=8, broken_count=0)
            batches = data.batches()
            assert sum(len(next(batches)["image"]) for _ in range(24)) == 1200
            batches.close()
            print("read", len(os.listdir("/proc/self/fd")))
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(code))
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.startswith("read"), done.stderr[-3000:]
    assert "broken" not in done.stderr


def test_the_limit_of_open_files_is_raised():
    code = """
        import resource
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        from t2i_jax.core.platform import prepare
        prepare(join=False)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)
