"""Eight fake devices on one CPU and a compile cache that outlives the run, set before JAX starts."""

import gc
import logging
import math
import os
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.fixtures import deprecations
from tests.fixtures.durations import CPUTimes, file_of, recorded

# Tests compile much and compute little: the compiler is asked for less. With the older emitters of fused loops, which
# jax 0.12 has no more, it takes a third to a half of the time, and code that is not split up costs fewer CPU seconds.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
# Eight devices on two busy cores may wait for each other for longer than the 40 s after which XLA gives up.
FLAGS += " --xla_cpu_collective_call_terminate_timeout_seconds=900"
FLAGS += " --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 12):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["T2I_CHECK_ARRAYS"] = "1"  # `core.arrays.typed` checks shapes and dtypes
os.environ.setdefault("T2I_PROGRAMS", "off")  # tests count traces, and what they patch is in no key
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

deprecations.install()
gc.set_threshold(50_000, 20, 50)  # tracing makes many small objects, few of them garbage: a twentieth of the time
ABSL = logging.getLogger("absl").level


def pytest_addoption(parser):
    parser.addoption("--cpu-times", metavar="FILE", help="write the CPU seconds of each test into a JSON file")


def pytest_configure(config):
    if file := config.getoption("--cpu-times"):
        config.pluginmanager.register(CPUTimes(Path(file)))


def pytest_collection_modifyitems(items):
    """Files that take long come first: no process has one of them left when the others have nothing more to do."""
    seconds = recorded()
    items.sort(key=lambda item: -seconds.get(file_of(item.nodeid), math.inf))


@pytest.fixture(autouse=True)
def logs():
    """The command silences a log that may tell of deprecated calls; for one test at most."""
    logging.getLogger("absl").setLevel(ABSL)  # a fixture of a module may have called it too
    yield
    logging.getLogger("absl").setLevel(ABSL)


@pytest.fixture(autouse=True, scope="module")
def programs():
    """Compiled programs live as long as their process: those of all tests would take gigabytes."""
    yield
    import jax  # after the flags above

    jax.clear_caches()


@pytest.fixture
def traces():
    """How often JAX has traced each jitted function in this test, by its name; not again where it has the program."""
    import jax

    counts: Counter[str] = Counter()

    def count(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/jaxpr_trace_duration":
            counts[fun_name] += 1

    jax.monitoring.register_event_duration_secs_listener(count)
    yield counts
    jax.monitoring.unregister_event_duration_listener(count)


@pytest.fixture
def user_cache(tmp_path_factory, monkeypatch):
    """The cache of the user, empty."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path
