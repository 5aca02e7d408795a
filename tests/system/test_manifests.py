"""launchers/mpijob-*.yaml: fields as the MPI Operator knows them, and parts that fit together.

The schema is this project's own (tests/schemas/mpijob.json): only the fields that are used. The Pod
templates are checked against Kubernetes' schemas, of 100 MB, by tests/system/manifests.sh.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smorms3_dist.launch.arguments import Options, parse

import fastjsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ROOT / "launchers"
IMAGE = (ROOT / "docker" / "Dockerfile").read_text()

check = fastjsonschema.compile(json.loads((ROOT / "tests/schemas/mpijob.json").read_text()))


class Manifest:
    def __init__(self, name: str) -> None:
        self.documents = list(yaml.safe_load_all((LAUNCHERS / name).read_text()))
        self.claim, self.job = self.documents
        self.spec = self.job["spec"]
        self.launcher, self.worker = (
            self.spec["mpiReplicaSpecs"][role]["template"]["spec"]
            for role in ("Launcher", "Worker")
        )

    @property
    def options(self) -> Options:
        """The launcher's command, as `smorms3-dist run` reads it."""
        command = self.launcher["containers"][0]["command"]
        assert command[:2] == ["smorms3-dist", "run"]
        local = [re.sub("^/app/", f"{ROOT}/", word) for word in command[2:]]
        return parse(local, "smorms3-dist run")


@pytest.fixture(params=["mpijob-cpu.yaml", "mpijob-gpu.yaml"])
def manifest(request: pytest.FixtureRequest) -> Manifest:
    return Manifest(request.param)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all keys of all mappings."""
    entries = enumerate(value) if isinstance(value, list) else ()
    for key, inner in value.items() if isinstance(value, dict) else entries:
        if isinstance(value, dict):
            yield (*path, key)
        yield from places(inner, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def test_every_misspelled_field_is_refused(manifest):
    accepted = []
    for document in manifest.documents:
        check(document)
        for *path, key in places(document):
            wrong = json.loads(json.dumps(document))  # what anchors share is divided
            parent = at(wrong, tuple(path))
            parent[key + "s"] = parent.pop(key)
            try:
                check(wrong)
            except fastjsonschema.JsonSchemaException:
                continue
            accepted.append((*path, key))
    assert accepted == []


@pytest.mark.parametrize(
    "path, value",
    [
        (("apiVersion",), "kubeflow.org/v1"),
        (("spec", "slotsPerWorker"), "2"),
        (("spec", "slotsPerWorker"), 0),
        (("spec", "launcherCreationPolicy"), "WaitForWorkers"),
        (("spec", "runPolicy", "cleanPodPolicy"), "running"),
        (("spec", "mpiReplicaSpecs", "Launcher", "replicas"), 2),
        (("spec", "mpiReplicaSpecs", "Worker", "restartPolicy"), "Always"),
        (("spec", "mpiReplicaSpecs", "Worker", "template", "spec", "containers"), []),
        (("metadata", "name"), "Digits"),
        (("spec", "slotsPerWorker"), None),
        (("spec", "sshAuthMountPath"), None),
        (("spec", "mpiReplicaSpecs"), None),
    ],
)
def test_what_the_operator_refuses_or_needs_is_refused_or_needed(manifest, path, value):
    wrong = copy.deepcopy(manifest.job)
    parent = at(wrong, path[:-1])
    assert path[-1] in parent
    if value is None:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    with pytest.raises(fastjsonschema.JsonSchemaException):
        check(wrong)


def test_the_launcher_leaves_the_hosts_to_the_operator_and_keeps_checkpoints(manifest):
    options = manifest.options
    assert options.is_python and options.backend == "auto"
    assert options.hosts is None and options.ranks is None
    assert options.max_restarts > 0
    script = list(options.command[options.command.index("smorms3_dist") + 1 :])
    assert Path(script[0]).is_file()
    for pod in manifest.launcher, manifest.worker:
        mounts = {m["name"]: Path(m["mountPath"]) for m in pod["containers"][0]["volumeMounts"]}
        claims = {
            volume["name"]: volume["persistentVolumeClaim"]["claimName"]
            for volume in pod["volumes"]
            if "persistentVolumeClaim" in volume
        }
        assert list(claims.values()) == [manifest.claim["metadata"]["name"]]
        assert mounts[next(iter(claims))] in options.checkpoint_dir.parents


def test_pods_mount_volumes_that_they_have_and_end_together(manifest):
    for pod in manifest.launcher, manifest.worker:
        mounted = [mount["name"] for mount in pod["containers"][0]["volumeMounts"]]
        assert sorted(mounted) == sorted(volume["name"] for volume in pod["volumes"])
    periods = [p["terminationGracePeriodSeconds"] for p in (manifest.launcher, manifest.worker)]
    assert periods[0] == periods[1] >= 60


def test_each_rank_of_a_pod_has_a_gpu():
    manifest = Manifest("mpijob-gpu.yaml")
    gpus = manifest.worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert manifest.spec["slotsPerWorker"] == manifest.options.gpus_per_node == gpus
    assert "nvidia.com/gpu" not in str(manifest.launcher)
    assert "--gpu" in manifest.options.command


def test_pods_are_as_the_image_expects_them(manifest):
    user = int(re.search(r"^USER (\d+):\1$", IMAGE, re.MULTILINE)[1])
    home = re.search(r"^WORKDIR (/home/.*)$", IMAGE, re.MULTILINE)[1]
    assert manifest.spec["sshAuthMountPath"] == f"{home}/.ssh"
    for pod in manifest.launcher, manifest.worker:
        context = pod["securityContext"]
        assert {context["runAsUser"], context["runAsGroup"], context["fsGroup"]} == {user}
    (container,) = manifest.worker["containers"]
    assert f"/usr/local/bin/{container['command'][0]}\n" in IMAGE
    ports = re.findall(r"^\s*Port (\d+)$", (ROOT / "docker/sshd_config").read_text(), re.MULTILINE)
    ports += re.findall(r"^\s*Port (\d+)$", (ROOT / "docker/ssh_config").read_text(), re.MULTILINE)
    assert ports == [str(container["ports"][0]["containerPort"])] * 2
