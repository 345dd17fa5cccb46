"""What a power cut leaves of a run, at every moment, ends as if there had been none."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from fake_runs import evaluated, events
from plait.config import Config, Machine
from plait.events import Evaluated, RoundDone
from plait.machine.files import save_tensors
from plait.runs import run as runs
from plait.runs.run import Run
from plait.runs.run_folder import load_events
from power_cut import Disk

CONFIG = Config(clients=2, rounds=3)
OFTEN = Machine(save_every=1)


class Counting:
    """An engine whose state is a number that tells which rounds were done, in which order."""

    def __init__(self) -> None:
        self.state = 0
        self.said = list(events(CONFIG, 0.8))
        self.started = self.said[0]
        self.schedule = SimpleNamespace(after=lambda _: True, rounds=CONFIG.rounds)

    def round(self, round_: int) -> RoundDone:
        self.state = 10 * self.state + round_ + 1
        return next(e for e in self.said if isinstance(e, RoundDone) and e.round == round_)

    def evaluate(self, round_: int) -> Evaluated:
        return evaluated(CONFIG, round_, 0.5)

    def save(self, path: Path, rounds_done: int) -> None:
        tensors = {"state": torch.tensor(self.state)}
        save_tensors(tensors, path, {"rounds_done": str(rounds_done)})

    def restore(self, path: Path) -> None:
        self.state = int(load_file(path)["state"])

    def save_adapters(self, out: Path, _: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "adapter_config.json").write_text(str(self.state))  # as PEFT writes it


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    monkeypatch.setitem(runs.ENGINES, "simulate", lambda *_: nullcontext(Counting()))
    monkeypatch.setattr(Run, "fingerprints", lambda _: {"rows": "0"})


def test_a_power_cut_leaves_a_run_that_ends_as_an_unbroken_one(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        disk = Disk(tmp_path / "disk", patched)
        whole = list(Run(CONFIG, tmp_path / "disk" / "run", machine=OFTEN))
    assert len(disk.images) > 30
    monkeypatch.setattr("os.fsync", lambda _: None)  # which takes its time
    for number, image in enumerate(disk.images):
        disk.leave(image, tmp_path / f"{number}")
        out = tmp_path / f"{number}" / "run"
        assert list(Run(CONFIG, out, machine=OFTEN, resume=True)) == whole == load_events(out)
        assert (out / "adapters" / "adapter_config.json").read_text() == "123"
    disk.close()


def test_events_that_do_not_reach_up_to_the_checkpoint_are_refused(tmp_path):
    out = tmp_path / "run"
    whole = list(islice(Run(CONFIG, out, machine=OFTEN), 6))
    file = out / "events.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    for left in (lines[:4], [*lines[:4], b"\0" * 9 + b"\n", *lines[4:]], []):
        file.write_bytes(b"".join(left))
        with pytest.raises(
            ValueError, match=r"ends .*and the checkpoint beside it is after round 1"
        ):
            list(Run(CONFIG, out, resume=True))
        assert file.read_bytes() == b"".join(left), "nothing is changed"
    file.write_bytes(b"".join(lines) + b"\0" * 9)
    assert list(Run(CONFIG, out, resume=True))[:6] == whole
