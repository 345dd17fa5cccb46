"""examples/deploy: command lines that plait takes, files that their tools take, and few rights.

What is checked with which tool, and what isn't, stands in docs/deploy.md.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import yaml

from conftest import save_encoder
from fake_network import Hub, member, start_peer
from plait.cli.arguments import parse
from plait.cli.peers import PeerCommand
from plait.config import Config
from plait.peers.certificates import free_ports, init_federation
from plait.peers.prometheus import serve_metrics
from plait.peers.transport import Counts

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "deploy"
UNIT, DOCKERFILE = FOLDER / "plait-peer.service", (FOLDER / "Dockerfile").read_text()
SERVICE = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]["peer"]
MANIFESTS = [*yaml.safe_load_all((FOLDER / "kubernetes" / "peer.yaml").read_text())]
POD = next(one for one in MANIFESTS if one["kind"] == "Job")["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
START = re.search(r"^ExecStart=(.*)$", UNIT.read_text(), re.MULTILINE)[1]


def tool(name: str) -> str:
    return shutil.which(name) or pytest.skip(f"there is no {name} here")


@pytest.mark.parametrize(
    "words",
    [
        shlex.split(START)[1:],
        SERVICE["command"],
        CONTAINER["args"],
        shlex.split(re.search(r"plait (peer .*)$", DOCKERFILE, re.MULTILINE)[1]),
    ],
    ids=["systemd", "compose", "kubernetes", "docker run"],
)
def test_its_command_is_one_of_plaits(words):
    command, *args = words
    given = parse(PeerCommand, command, args)
    assert (command, given.name, given.config.name) == ("peer", "ada", "federation.toml")


def test_systemd_takes_the_unit_and_finds_it_closed(tmp_path):
    analyze, unit = tool("systemd-analyze"), tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace(START.split()[0], sys.executable))
    done = subprocess.run([analyze, "verify", unit], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    rated = [analyze, "security", "--offline=yes", "--threshold=20", unit]
    assert subprocess.run(rated, capture_output=True).returncode == 0


def test_a_container_has_few_rights():
    own = CONTAINER["securityContext"]
    assert POD["securityContext"]["runAsNonRoot"]
    assert f"--uid {POD['securityContext']['runAsUser']} " in DOCKERFILE
    assert SERVICE["user"] == str(POD["securityContext"]["runAsUser"])
    assert own["readOnlyRootFilesystem"]
    assert SERVICE["read_only"]
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"]["drop"] == SERVICE["cap_drop"] == ["ALL"]
    assert POD["automountServiceAccountToken"] is False
    assert SERVICE["ports"] == ["7600:7600"]
    assert [one["read_only"] for one in SERVICE["volumes"] if one["target"] == "/fed"] == [True]
    assert CONTAINER["resources"]["limits"]["memory"]


def test_kustomize_puts_the_key_into_a_secret_and_nowhere_else(tmp_path):
    kubectl = tool("kubectl")
    shutil.copytree(FOLDER / "kubernetes", tmp_path, dirs_exist_ok=True)
    file = init_federation(tmp_path / "fed", ["ada", "ben"], Config())
    shared = ("federation.toml", "ca.pem", "revoked.txt")
    for name in (*shared, "ada/cert.pem", "ada/key.pem"):
        shutil.copy(file.parent / name, tmp_path)
    shutil.copy(file.parent / "ada" / "peer.toml", tmp_path)
    done = subprocess.run([kubectl, "kustomize", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kinds = {}
    for one in yaml.safe_load_all(done.stdout):
        kinds.setdefault(one["kind"], []).append(one)
    assert [one["data"].keys() for one in kinds["Secret"]] == [{"cert.pem", "key.pem"}]
    assert all("PRIVATE" not in str(one) for one in kinds["ConfigMap"])
    (job,) = kinds["Job"]
    sources = job["spec"]["template"]["spec"]["volumes"][0]["projected"]["sources"]
    named = {row["name"] for one in sources for row in one.values()}
    assert named == {one["metadata"]["name"] for one in kinds["ConfigMap"] + kinds["Secret"]}
    for what in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert job["spec"]["template"]["spec"]["containers"][0][what]["exec"]["command"]


def test_the_probe_tells_a_peer_that_listens_from_none():
    command = CONTAINER["livenessProbe"]["exec"]["command"]
    assert SERVICE["healthcheck"]["test"] == ["CMD", *command]
    (port,) = free_ports(1)
    probe = compile(command[-1].replace("9600", str(port)), "probe", "exec")
    desk = start_peer(Hub(), 0, Config(clients=2), [member("p0"), member("p1")]).desk
    stop = serve_metrics(f"127.0.0.1:{port}", desk, SimpleNamespace(counts=Counts(), expires=dict))
    exec(probe, {})
    stop()
    with pytest.raises(URLError):
        exec(probe, {})


def test_the_image_gets_all_that_its_steps_read(tmp_path):
    for sources, target in re.findall(r"^COPY (.+) (\S+)$", DOCKERFILE, re.MULTILINE):
        for name in sources.split():
            there = ROOT / name
            goes = tmp_path / target.strip("/") / ("" if there.is_dir() else name)
            (shutil.copytree if there.is_dir() else shutil.copy)(there, _made(goes))
    steps = DOCKERFILE.replace("\\\n", "")
    read = re.findall(r"-[cr] /(src/\S+)", steps)
    assert len(read) == 2
    assert all((tmp_path / name).is_file() for name in read)
    project = tomllib.loads((tmp_path / "src" / "pyproject.toml").read_text())
    needed = [project["project"]["readme"], *project["project"]["license-files"]]
    needed += project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert all((tmp_path / "src" / name).exists() for name in needed)
    assert re.search(r'"/src\[peer\]"', steps)


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


SANDBOX = """
mount --make-rprivate / && mount --bind "$1" "$1" && mount -o remount,bind,ro / || exit 99
shift
exec setpriv --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
"""


@pytest.mark.slow
def test_a_peer_writes_its_state_directory_and_nothing_else():
    """As systemd and Kubernetes have it: no capabilities, all else read-only."""
    unshare, home = tool("unshare"), Path(tempfile.mkdtemp(dir="/var/tmp"))
    probe = subprocess.run([unshare, "-m", "sh", "-c", SANDBOX, "sh", home, "true"])
    if probe.returncode:
        pytest.skip("mount namespaces take root")
    config = Config(
        task="movies", rounds=2, local_steps=1, batch_size=2, rank=2, topology="complete",
        max_length=16, eval_rows=8, backbone=str(save_encoder("mean-pooled", home / "model")),
    )  # fmt: skip
    file = init_federation(home / "etc", ["ada", "ben"], config)
    running = []
    for name in ("ada", "ben"):
        state, own = home / f"lib-{name}", file.parent / name / "peer.toml"
        state.mkdir()
        own.write_text(own.read_text().replace('out = "out"', f'out = "{state}/out"'))
        words = [sys.executable, "-m", "plait", "peer", "--config", file, "--name", name]
        env = os.environ | {"PLAIT_CACHE": f"{state}/cache", "HF_HOME": f"{state}/hf"}
        env |= {"HOME": "/nonexistent", "TMPDIR": str(state), "PYTHONDONTWRITEBYTECODE": "1"}
        running.append(
            subprocess.Popen(
                [unshare, "-m", "sh", "-c", SANDBOX, "sh", state, *words],
                env=env, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    for client, (one, name) in enumerate(zip(running, ("ada", "ben"), strict=True)):
        _, said = one.communicate(timeout=240)
        assert one.returncode == 0, said
        assert (home / f"lib-{name}" / "out" / "adapters" / f"client-{client}").is_dir()
    assert not list(file.parent.glob("*/out"))
    shutil.rmtree(home)
