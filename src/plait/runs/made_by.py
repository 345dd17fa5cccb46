"""What a run was made by: the versions and the machine, in the run folder's `made-by.json`."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from plait.config import Machine
from plait.machine.devices import resolve_device

PACKAGES = ("torch", "transformers", "peft", "numpy")


def made_by(machine: Machine) -> dict[str, str | int]:
    """The versions of plait, Python and what computes, and where that is.

    Example:
        >>> sorted(made_by(Machine(device="cpu")))[:4]
        ['device', 'numpy', 'peft', 'processor']
    """
    device = resolve_device(machine.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "version": code_version(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "system": platform.platform(),
        "processor": _processor(),
        "device": gpu,
        "threads": torch.get_num_threads(),
    }


@cache
def code_version() -> str:
    """The version of plait, and in a clone of its repository the commit, `-dirty` if changed."""
    ask = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return version("plait")
    return f"{version('plait')}+{commit}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
