#!/bin/bash
# Checks the Pod templates and claims of launchers/*.yaml against Kubernetes' own schemas, strictly (a
# field that it does not know is an error), for the oldest and the newest version that is known, and makes
# sure that a misspelled field is found.
#
#   bash tests/system/manifests.sh
#
# Needs a package index: kubernetes-validate, with all schemas, takes 110 MB in .cache/manifests, where
# the environment stays for the next time. PYTHON names the CPython to use.
set -eu

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
environment=$root/.cache/manifests
if ! "$environment/bin/python" -c 'import kubernetes_validate' 2>/dev/null; then
    rm -rf "$environment"
    "${PYTHON:-python3}" -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check \
        -c "$root/constraints.txt" "kubernetes-validate>=1.37" PyYAML ||
        { rm -rf "$environment" && echo "manifests.sh: no kubernetes-validate to be had" && exit 1; }
fi
exec "$environment/bin/python" - "$root"/launchers/*.yaml <<'PYTHON'
import copy
import sys

import kubernetes_validate
import yaml

VERSIONS = ("1.28", kubernetes_validate.latest_version())


def resources(path):
    """The claims, and a Pod for each template, as the operator makes it."""
    with open(path) as file:
        for document in yaml.safe_load_all(file):
            if document["kind"] != "MPIJob":
                yield document["metadata"]["name"], document
                continue
            for role, replicas in document["spec"]["mpiReplicaSpecs"].items():
                spec = {**replicas["template"]["spec"], "restartPolicy": replicas["restartPolicy"]}
                name = f"{document['metadata']['name']}-{role.lower()}"
                pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
                yield name, pod


checked = 0
for path in sys.argv[1:]:
    for name, resource in resources(path):
        for version in VERSIONS:
            kubernetes_validate.validate(resource, version, strict=True)
            wrong = copy.deepcopy(resource)
            wrong["spec"]["misspelled"] = 1
            try:
                kubernetes_validate.validate(wrong, version, strict=True)
            except kubernetes_validate.ValidationError:
                checked += 1
            else:
                sys.exit(f"manifests.sh: Kubernetes {version} takes any field of {name}")
if not checked:
    sys.exit("manifests.sh: there are no manifests")
print(f"manifests.sh: all {checked // len(VERSIONS)} resources are right, for {VERSIONS}")
PYTHON
