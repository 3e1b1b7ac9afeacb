#!/usr/bin/env python3
"""A Kubernetes JobSet for a run on GKE, as YAML on standard output.

    IMAGE=registry/t2i_jax launch/jobset.py NAME v5e:16x16 t2i train configs/text_to_image.py --run gs://...

The chips are written as for `t2i plan`: a TPU topology, or GPUs by their number (h100:64). A pod is a host. Variables
of the environment say what differs between clusters:

    SLICES           TPU slices that train together (1); their number divides `mesh.data`
    MACHINE          machine type, where a chip has several: ct6e-standard-8t, a3-megagpu-8g, a2-ultragpu-8g, ...
    NAMESPACE        of the JobSet; the one of kubectl unless given
    SERVICE_ACCOUNT  Kubernetes service account, which may read and write the buckets
    CAPACITY         spot, reservation:NAME, or queued for the Dynamic Workload Scheduler; on demand unless given
    QUEUE, PRIORITY  Kueue's local queue; the priority class
    BUCKETS          buckets to mount by gcsfuse: "name" at /gcs/name, or "name:/path"; several with spaces between
    CACHE            what is mounted at /cache, where programs and indices are kept: claim:NAME, host:/path or disk
    ENV              variables of the run: "WANDB_MODE=offline A='b c'"
    SECRETS          names of secrets whose keys become variables of the run
    PULL_SECRET      name of the secret with which the image is fetched
    HOST_NETWORK=1   the network of the node itself, as some clusters want between slices
    PRIVILEGED=1     a privileged container, as older versions of GKE want for TPUs
    GRACE, RETRIES   seconds to save after the notice of a preemption (120); restarts of all hosts (10)
    OVERLAY          a YAML or JSON file with further parts of the manifest, such as the sidecar of a GPU network:
                     it is merged in, lists of named things by name
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn


@dataclasses.dataclass(frozen=True)
class Machine:
    """A machine type of Google Cloud: its accelerator's name on GKE, and how many chips one machine has."""

    chip: str
    accelerator: str
    chips: int
    tpu: bool = True


TPU, GPU = "google.com/tpu", "nvidia.com/gpu"
MACHINES = {
    "ct4p-hightpu-4t": Machine("v4", "tpu-v4-podslice", 4),
    "ct5lp-hightpu-4t": Machine("v5e", "tpu-v5-lite-podslice", 4),
    "ct5lp-hightpu-1t": Machine("v5e", "tpu-v5-lite-podslice", 1),
    "ct5lp-hightpu-8t": Machine("v5e", "tpu-v5-lite-podslice", 8),
    "ct5p-hightpu-4t": Machine("v5p", "tpu-v5p-slice", 4),
    "ct6e-standard-4t": Machine("v6e", "tpu-v6e-slice", 4),
    "ct6e-standard-1t": Machine("v6e", "tpu-v6e-slice", 1),
    "ct6e-standard-8t": Machine("v6e", "tpu-v6e-slice", 8),
    "tpu7x-standard-4t": Machine("tpu7x", "tpu7x", 4),
    "tpu7x-standard-1t": Machine("tpu7x", "tpu7x", 1),
    "a2-highgpu-8g": Machine("a100", "nvidia-tesla-a100", 8, False),
    "a2-highgpu-1g": Machine("a100", "nvidia-tesla-a100", 1, False),
    "a2-highgpu-2g": Machine("a100", "nvidia-tesla-a100", 2, False),
    "a2-highgpu-4g": Machine("a100", "nvidia-tesla-a100", 4, False),
    "a2-megagpu-16g": Machine("a100", "nvidia-tesla-a100", 16, False),
    "a2-ultragpu-8g": Machine("a100", "nvidia-a100-80gb", 8, False),
    "a3-highgpu-8g": Machine("h100", "nvidia-h100-80gb", 8, False),
    "a3-megagpu-8g": Machine("h100", "nvidia-h100-mega-80gb", 8, False),
    "a3-ultragpu-8g": Machine("h200", "nvidia-h200-141gb", 8, False),
    "a4-highgpu-8g": Machine("b200", "nvidia-b200", 8, False),
    "a4x-highgpu-4g": Machine("gb200", "nvidia-gb200", 4, False),
}
"""The first of a chip is taken where MACHINE does not say, or the one with a single chip where that is all there is."""

STOP = (2, 130)
"""Statuses that another try will not mend: an error of the user's, and Ctrl-C."""


class Wrong(Exception):
    """What the user can mend, in one line."""


@dataclasses.dataclass(frozen=True)
class Hosts:
    """How a request for chips becomes pods: so many on each slice, and the chips of each."""

    machine: Machine
    topology: str
    count: int
    chips: int


def hosts_of(chips: str, machine: str = "") -> Hosts:
    """The hosts of one slice of `v5e:16x16`, or of all of `h100:64`. Errors: `Wrong`."""
    name, _, shape = chips.partition(":")
    kinds = {k: m for k, m in MACHINES.items() if m.chip == name}
    if not kinds:
        raise Wrong(
            f"{chips}: there is no chip '{name}', only {', '.join(sorted({m.chip for m in MACHINES.values()}))}"
        )
    if machine and machine not in kinds:
        raise Wrong(f"MACHINE={machine}: machines with {name} are {', '.join(kinds)}")
    axes = {"v5e": 2, "v6e": 2}.get(name, 3) if next(iter(kinds.values())).tpu else 1
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") != axes - 1:
        raise Wrong(f"{chips}: it is written like {name}:{'x'.join(['4'] * axes) if axes > 1 else '8'}")
    total = math.prod(map(int, shape.split("x")))
    single = next((k for k, m in kinds.items() if m.tpu and m.chips == total == 1), "")
    kind = kinds[machine or single or next(iter(kinds))]
    per_host = kind.chips if kind.tpu else min(kind.chips, total)
    if kind.tpu and kind.chips != 4 and total != kind.chips:
        raise Wrong(f"{chips}: a machine of {kind.chips} chips is a slice by itself, of {kind.chips} chips")
    if total % per_host:
        raise Wrong(f"{chips}: {total} chips are no whole number of hosts, which have {kind.chips} each")
    return Hosts(kind, shape, total // per_host, per_host)


def manifest(name: str, chips: str, command: list[str], variables: Mapping[str, str]) -> dict[str, Any]:
    """The JobSet as a value. Errors: `Wrong`."""
    said = lambda key, default="": variables.get(key) or default
    if len(name) > 40 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise Wrong(f"{name}: a name has at most 40 of a-z, 0-9 and -, and begins with a letter")
    if not said("IMAGE"):
        raise Wrong("IMAGE: the container image, made with launch/Dockerfile")
    hosts, slices = hosts_of(chips, said("MACHINE")), number("SLICES", said("SLICES", "1"), 1)
    machine = hosts.machine
    if slices > 1 and (not machine.tpu or hosts.count == 1):
        wanted = "slices of several hosts" if machine.tpu else "TPUs; of GPUs ask for more"
        raise Wrong(f"SLICES={slices}: several slices are for {wanted}, not for {chips}")
    environment = {**started(name, hosts, slices), **pairs(said("ENV"))}
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    # Worker processes of the input pipeline share their batches through it.
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    if cache := said("CACHE"):
        volumes.append({"name": "cache", **cache_volume(cache)})
        mounts.append({"name": "cache", "mountPath": "/cache"})
        environment.setdefault("XDG_CACHE_HOME", "/cache")
    buckets = said("BUCKETS").split()
    for i, bucket in enumerate(buckets):
        bucket, _, path = bucket.partition(":")
        attributes = {"bucketName": bucket, "mountOptions": "implicit-dirs"}
        volumes.append(
            {"name": f"bucket-{i}", "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}
        )
        mounts.append({"name": f"bucket-{i}", "mountPath": path or f"/gcs/{bucket}"})
    resource = {TPU if machine.tpu else GPU: hosts.chips}
    container = {
        "name": "t2i",
        "image": said("IMAGE"),
        "command": command,
        "env": [{"name": k, **(v if isinstance(v, dict) else {"value": v})} for k, v in environment.items()],
        "envFrom": [{"secretRef": {"name": s}} for s in said("SECRETS").split()],
        "ports": [{"containerPort": p} for p in ((8471, 8476, 8482) if machine.tpu else (PORT,))],
        "securityContext": {"privileged": True} if said("PRIVILEGED") == "1" else {},
        "resources": {"requests": resource, "limits": dict(resource)},
        "volumeMounts": mounts,
    }
    selector, tolerations = places(hosts, said("MACHINE"), said("CAPACITY"))
    pod = {
        "restartPolicy": "Never",
        "serviceAccountName": said("SERVICE_ACCOUNT"),
        "priorityClassName": said("PRIORITY"),
        "terminationGracePeriodSeconds": number("GRACE", said("GRACE", "120"), 0),
        "imagePullSecrets": [{"name": said("PULL_SECRET")}] if said("PULL_SECRET") else [],
        "nodeSelector": selector,
        "tolerations": tolerations,
        "containers": [container],
        "volumes": volumes,
    }
    if said("HOST_NETWORK") == "1":
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    ends = {"action": "FailJob", "onExitCodes": {"containerName": "t2i", "operator": "In", "values": list(STOP)}}
    job = {
        "parallelism": hosts.count,
        "completions": hosts.count,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [ends]},
        "template": {
            "metadata": {"annotations": {"gke-gcsfuse/volumes": "true"} if buckets else {}},
            "spec": pod,
        },
    }
    # All pods of a job on one slice, and no other job on it; hosts that are slices by themselves share a pool of nodes.
    alone = machine.tpu and hosts.count > 1
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"} if alone else {}
    found = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "namespace": said("NAMESPACE"),
            "labels": {"kueue.x-k8s.io/queue-name": said("QUEUE")} if said("QUEUE") else {},
            "annotations": exclusive,
        },
        "spec": {
            # All hosts are started anew when one fails, unless it says that another try will not mend it.
            "failurePolicy": {
                "maxRestarts": number("RETRIES", said("RETRIES", "10"), 0),
                "rules": [{"name": "stop", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "slice", "replicas": slices, "template": {"spec": job}}],
        },
    }
    return merged(pruned(found), overlay(said("OVERLAY")))


PORT = 8482
"""Of the first host, where JAX's coordinator listens."""


def started(name: str, hosts: Hosts, slices: int) -> dict[str, Any]:
    """Variables by which the processes find each other. GKE itself sets TPU_WORKER_HOSTNAMES within a TPU slice and
    MEGASCALE_* among slices, and nothing for GPUs."""
    if hosts.machine.tpu:
        return {"T2I_CLUSTER": "1"} if hosts.count * slices > 1 else {}
    index = {
        "valueFrom": {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    }
    several = {
        "JAX_COORDINATOR_ADDRESS": f"{name}-slice-0-0.{name}:{PORT}",
        "JAX_NUM_PROCESSES": str(hosts.count),
        "JAX_PROCESS_ID": index,
    }
    # GKE lays the driver there, where an image that is not one of CUDA's does not look.
    about = {"LD_LIBRARY_PATH": "/usr/local/nvidia/lib64", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
    return about | (several if hosts.count > 1 else {})


def places(hosts: Hosts, machine: str, capacity: str) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Node selector and tolerations."""
    if hosts.machine.tpu:
        selector = {
            "cloud.google.com/gke-tpu-accelerator": hosts.machine.accelerator,
            "cloud.google.com/gke-tpu-topology": hosts.topology,
        }
    else:
        selector = {"cloud.google.com/gke-accelerator": hosts.machine.accelerator}
    tolerations = [{"key": TPU if hosts.machine.tpu else GPU, "operator": "Exists", "effect": "NoSchedule"}]
    if machine:
        selector["node.kubernetes.io/instance-type"] = machine
    kind, _, name = capacity.partition(":")
    if kind == "spot":
        selector["cloud.google.com/gke-spot"] = "true"
        tolerations.append({"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"})
    elif kind == "queued":
        selector["cloud.google.com/gke-queued"] = "true"
        tolerations.append({"key": "cloud.google.com/gke-queued", "operator": "Exists", "effect": "NoSchedule"})
    elif kind == "reservation" and name:
        selector["cloud.google.com/reservation-name"] = name
    elif capacity:
        raise Wrong(f"CAPACITY={capacity}: it is spot, reservation:NAME or queued")
    return selector, tolerations


def cache_volume(text: str) -> dict[str, Any]:
    kind, _, name = text.partition(":")
    if kind == "claim" and name:
        return {"persistentVolumeClaim": {"claimName": name}}
    if kind == "host" and name.startswith("/"):
        return {"hostPath": {"path": name, "type": "DirectoryOrCreate"}}
    if text == "disk":
        return {"emptyDir": {}}
    raise Wrong(f"CACHE={text}: it is claim:NAME, host:/path or disk")


def number(name: str, text: str, least: int) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise Wrong(f"{name}={text}: it is a whole number, at least {least}")
    return int(text)


def pairs(text: str) -> dict[str, str]:
    """`A=b C='d e'` as a dictionary."""
    try:
        words = [word.partition("=") for word in shlex.split(text)]
    except ValueError as error:
        raise Wrong(f"ENV={text}: {error}") from error
    for key, equals, _ in words:
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", key, re.ASCII):
            raise Wrong(f"ENV: '{key}{equals}' is not written like NAME=value")
    return {key: value for key, _, value in words}


def overlay(path: str) -> dict[str, Any]:
    if not path:
        return {}
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".json"):
            found = json.loads(text)
        else:
            import yaml

            found = yaml.safe_load(text)
    except ImportError as error:
        raise Wrong(f"OVERLAY={path}: YAML needs the package pyyaml; JSON needs none") from error
    except Exception as error:  # of the file system, or of either language
        raise Wrong(f"OVERLAY={path}: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise Wrong(f"OVERLAY={path}: it is a part of a JobSet, as spec: ...")
    return found


def merged(base: Any, more: Any) -> Any:
    """`base` with what `more` says: dictionaries key by key, lists of things with names by name, all else replaced."""
    if isinstance(base, dict) and isinstance(more, dict):
        return base | {k: merged(base[k], v) if k in base else v for k, v in more.items()}
    named = lambda x: isinstance(x, list) and all(isinstance(e, dict) and "name" in e for e in x)
    if named(base) and named(more):
        old, new = ({e["name"]: e for e in x} for x in (base, more))
        return list(merged(old, new).values())
    return more


def pruned(value: Any) -> Any:
    """Without what is empty: "", [] and {}, except `emptyDir: {}` and the value of a variable."""
    if isinstance(value, dict):
        return {k: pruned(v) for k, v in value.items() if k in ("emptyDir", "value") or pruned(v) not in ("", [], {})}
    return [pruned(v) for v in value] if isinstance(value, list) else value


def yaml_of(value: Any, indent: str = "") -> str:
    """A value of dictionaries, lists, strings and numbers as YAML, beginning on a new line."""
    if isinstance(value, dict) and value:
        return "".join(f"\n{indent}{scalar(k)}:{yaml_of(v, indent + '  ')}" for k, v in value.items())
    if isinstance(value, list) and value:
        return "".join(f"\n{indent}- {yaml_of(v, indent + '  ').lstrip()}" for v in value)
    return " " + scalar(value)


def scalar(value: Any) -> str:
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z/][\w./-]*", value, re.ASCII)
    words = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")
    return value if plain and value.lower() not in words else json.dumps(value, ensure_ascii=False)


def main(words: list[str]) -> None:
    if len(words) < 3 or words[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if words[:1] in (["-h"], ["--help"]) else 2)
    try:
        print(yaml_of(manifest(words[0], words[1], words[2:], os.environ)).lstrip())
    except Wrong as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    print(f"jobset.py: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
