"""What is set for the whole process, once and in one place."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from plait.cli.main import main
from plait.machine.process_settings import ENVIRONMENT, MALLOC, configure_process

MAKEFILE = Path(__file__).parents[2] / "Makefile"
GLIBC = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_TOP_PAD_": -2, "MALLOC_MMAP_THRESHOLD_": -3}
"""glibc's names for its options in the environment -> their numbers."""


def test_what_the_user_has_set_stays_and_a_second_time_changes_nothing(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    for _ in range(2):
        configure_process()
        assert os.environ["GOMP_SPINCOUNT"] == "7"
        assert os.environ["THP_MEM_ALLOC_ENABLE"] == ENVIRONMENT["THP_MEM_ALLOC_ENABLE"]


def test_the_command_line_goes_through_it(monkeypatch, capsys):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    assert main(["--version"]) == 0
    assert {name: os.environ[name] for name in ENVIRONMENT} == ENVIRONMENT


def test_torch_is_not_loaded_before_its_environment_is_set():
    code = (
        "import sys, plait.cli.main as c; c.main(['--version']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_threads(threads):
    threads(1)
    configure_process()
    assert torch.get_num_threads() == 1
    configure_process(2)
    assert torch.get_num_threads() == 2


def test_rivals_are_measured_with_the_same_settings():
    line = MAKEFILE.read_text().replace("\\\n", " ").partition("AS_PLAIT := ")[2].partition("\n")[0]
    given = dict(one.split("=") for one in line.split())
    assert given == ENVIRONMENT | {name: str(MALLOC[number]) for name, number in GLIBC.items()}


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"),
    reason="other allocators than glibc's are left as they are",
)
def test_what_a_step_frees_is_there_for_the_next_one():
    faults = {}
    for way in ("pass", "configure_process()"):
        code = f"""
import resource, threading, torch
from plait.machine.process_settings import configure_process
{way}
def steps(count):
    for _ in range(count):
        [torch.empty(300_000).fill_(0) for _ in range(20)]
def work():
    steps(5)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    steps(5)
    print(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        faults[way] = int(done.stdout)
    assert faults["configure_process()"] < 100 < faults["pass"]
