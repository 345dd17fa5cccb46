"""A stage for faults: a federation of real processes on a tiny model, quick to start and to kill.

Processes are forked from a server that has imported everything, so one starts in a moment.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from conftest import save_language_model
from plait.config import Config
from plait.engines.job import prepare
from plait.engines.simulate import simulate
from plait.events import Evaluated
from plait.peers.certificates import free_ports, init_federation, make_certificate
from plait.peers.credentials import Pair
from plait.peers.federation import Limits, load_federation, load_peer

NAMES = ("ada", "ben", "cai")
LIMITS = Limits(round_timeout_s=20, start_timeout_s=30, linger_s=20)

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["plait.peers.process", "transformers.models.bert.modeling_bert", "sklearn.metrics", "faulty"]
)


def tiny_files(folder: Path) -> Config:
    """A random model, its tokenizer and some rows in files; the config that uses them."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    words = [f"w{k}" for k in range(60)]
    model = folder / "model"
    BertModel(
        BertConfig(
            vocab_size=65,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=32,
        )
    ).save_pretrained(model)
    (model / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    )
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    for name, rows in (("train.csv", 180), ("dev.csv", 60)):
        with (folder / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for _ in range(rows):
                label = int(rng.integers(2))
                mark = rng.integers(0, 10, 3) + 10 * label
                noise = rng.integers(20, 60, 5)
                writer.writerow(
                    [" ".join(words[k] for k in rng.permutation([*mark, *noise])), label]
                )
    return Config(
        method="adf",
        task="file",
        train_file=str(folder / "train.csv"),
        dev_file=str(folder / "dev.csv"),
        backbone=str(model),
        pooling="mean",
        label_skew="iid",
        topology="ring",
        clients=len(NAMES),
        rounds=6,
        switch_every=2,
        local_steps=16,
        batch_size=8,
        rank=2,
        lr=1e-2,
        max_length=16,
        eval_every=3,
        optimizer_state="keep",
    )


def chat_files(folder: Path) -> dict[str, object]:
    """A random language model and conversations in files; the settings that use them."""
    save_language_model(folder)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{k}?"},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for k in range(60)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "task": "chat", "train_file": str(folder / "rows.jsonl"), "dev_file": None,
        "backbone": str(folder), "pooling": "auto", "max_length": 64, "local_steps": 2,
    }  # fmt: skip


@dataclass
class Play:
    """A federation in a folder, and the processes that were started.

    Attributes:
        config_file: `federation.toml`.
        started: The processes of each peer, one after another.
    """

    folder: Path
    config_file: Path
    started: dict[str, list[BaseProcess]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, folder: Path, config: Config, limits: Limits = LIMITS, names=NAMES, labels=()
    ) -> Play:
        place = folder / "federation"
        return cls(folder, init_federation(place, names, config, limits=limits, labels=labels))

    def add(self, name: str) -> str:
        """The files of one who is no member yet; its address."""
        folder, last = self.config_file.parent, load_federation(self.config_file).names[-1]
        address = f"127.0.0.1:{free_ports(1)[0]}"
        pair = make_certificate(self.authority(), name)
        (folder / name).mkdir()
        (folder / name / "cert.pem").write_bytes(pair.certificate)
        (folder / name / "key.pem").write_bytes(pair.key)
        own = (folder / last / "peer.toml").read_text().splitlines()
        lines = [line for line in own if not line.startswith(("listen", "metrics"))]
        (folder / name / "peer.toml").write_text("\n".join([f'listen = "{address}"', *lines, ""]))
        return address

    def own_rows(self, name: str, lines: Sequence[str]) -> None:
        """Give a peer a file of rows of its own; `lines` has the header, too."""
        folder = self.config_file.parent / name
        (folder / "rows.csv").write_text("\n".join([*lines, ""]))
        with (folder / "peer.toml").open("a") as file:
            file.write('[local]\ntrain_file = "rows.csv"\n')

    def start(
        self,
        name: str,
        fault: str = "",
        *details: object,
        config: Path | None = None,
        trust: str | None = None,
    ):
        """Start a peer, with a fault by its name in `faulty.FAULTS`."""
        import faulty

        arguments = (
            str(config or self.config_file),
            name,
            str(self.log(name)),
            fault,
            details,
            trust,
        )
        process = FORKS.Process(target=faulty.live, args=arguments)
        process.start()
        self.started.setdefault(name, []).append(process)
        return process

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def said(self, name: str) -> list[dict]:
        """The lines of a peer's log that are its own."""
        if not self.log(name).exists():
            return []
        lines = self.log(name).read_text(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def reasons(self, name: str) -> set[tuple[str, str, str]]:
        """(kind, peer, reason) of what a peer's log has."""
        return {
            (line["kind"], line.get("peer", ""), line.get("reason", ""))
            for line in self.said(name)
            if "kind" in line
        }

    def out(self, name: str) -> Path:
        return load_peer(self.config_file, name).out

    def rounds_done(self, name: str) -> int:
        events = self.out(name) / "events.jsonl"
        return events.read_text().count('{"event": "RoundDone"') if events.exists() else 0

    def wait_for(self, what: Callable[[], bool], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, {name: self.said(name)[-5:] for name in NAMES}
            time.sleep(0.02)

    def end(self, name: str, seconds: float = 120.0) -> int:
        """Wait for a peer's latest process; its exit code."""
        process = self.started[name][-1]
        process.join(seconds)
        assert process.exitcode is not None, f"{name} hangs: {self.said(name)[-5:]}"
        return process.exitcode

    def all_end(self, names: Sequence[str] = NAMES) -> None:
        """Every one of these ends its run; nobody hangs or crashes."""
        codes = {name: self.end(name) for name in names}
        assert not any(codes.values()), (codes, {name: self.said(name)[-5:] for name in names})
        for name in names:
            assert (self.out(name) / "summary.json").exists(), self.said(name)[-5:]

    def clear(self) -> None:
        """Nothing is left running."""
        for processes in self.started.values():
            for process in processes:
                if process.is_alive():
                    assert process.pid is not None
                    os.kill(process.pid, signal.SIGCONT)
                    process.kill()
                process.join()

    # -- files of a peer that differ from the others'

    def changed(self, name: str, old: str, new: str) -> Path:
        """A copy of the federation's files for one peer, with a change in federation.toml."""
        copy = self.folder / f"files-of-{name}"
        shutil.copytree(self.config_file.parent, copy)
        path = copy / "federation.toml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        own = copy / name / "peer.toml"
        own.write_text(own.read_text().replace('"out"', f'"{self.out(name)}"'))
        return path

    def rerouted(self, name: str, to: str, address: str) -> Path:
        """The same, with another address for one neighbour."""
        return self.changed(name, load_federation(self.config_file).member(to).address, address)

    def authority(self) -> Pair:
        """The federation's own authority."""
        folder = self.config_file.parent
        return Pair((folder / "ca.pem").read_bytes(), (folder / "ca.key").read_bytes())

    # -- results

    def adapter(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(next(self.out(name).glob("adapters/*/adapter_model.safetensors")))

    def score(self, name: str) -> float:
        return float(json.loads((self.out(name) / "summary.json").read_text())["accuracy"])

    def summary(self, name: str) -> dict:
        return json.loads((self.out(name) / "summary.json").read_text())


@dataclass(frozen=True)
class Faultless:
    """What a simulation of the same run gives: adapters by peer, and scores."""

    adapters: dict[str, dict[str, torch.Tensor]]
    scores: dict[str, float]

    @classmethod
    def of(cls, config: Config, folder: Path) -> Faultless:
        from plait.model.peft_adapters import save_adapters

        job = prepare(config)
        stack = job.initial_stack()
        *_, last = simulate(job, stack)
        assert isinstance(last, Evaluated)
        save_adapters(job.backbone, stack, config, folder)
        adapters = {
            name: load_file(folder / f"client-{k}" / "adapter_model.safetensors")
            for k, name in enumerate(NAMES)
        }
        return cls(adapters, dict(zip(NAMES, last.scores, strict=True)))

    def far(self, play: Play, name: str) -> float:
        """Largest difference of a peer's final adapter from the simulation's."""
        found = play.adapter(name)
        expected = self.adapters[name]
        assert found.keys() == expected.keys()
        return max(float((found[key] - expected[key]).abs().max()) for key in found)


if __name__ == "__main__":  # try it out: python stage.py FOLDER
    place = Path(sys.argv[1])
    config = tiny_files(place)
    begin = time.time()
    expected = Faultless.of(config, place / "simulated")
    print(expected.scores, time.time() - begin)
    play = Play.of(place, config)
    begin = time.time()
    for name in NAMES:
        play.start(name)
    play.all_end()
    print([expected.far(play, name) for name in NAMES], time.time() - begin)
