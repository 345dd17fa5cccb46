"""A run: an iterator of events, and what they leave, in memory or in a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftModel

from plait.config import THIS_MACHINE, Config, Machine
from plait.data.objectives import LANGUAGE, OBJECTIVES
from plait.engines.evaluation import Evaluator
from plait.engines.fingerprints import fingerprints
from plait.engines.job import prepare
from plait.engines.local_training import evaluate
from plait.engines.rounds import Engine, all_rounds
from plait.engines.simulate import Simulation
from plait.engines.steps import Phase, local_steps
from plait.events import Evaluated, Event, RoundDone, Started
from plait.figures import best_evaluation, has_stopped, summarize
from plait.lookup import lookup
from plait.machine.files import held, make_lasting
from plait.model.loading import Loaded, load_for
from plait.runs.answers import answer
from plait.runs.made_by import made_by
from plait.runs.run_folder import RunFolder, load_finished, load_summary
from plait.runs.samples import write_samples
from plait.runs.trained import Client, Prediction, Text, predict


def simulation(
    config: Config,
    machine: Machine,
    phase: Phase = local_steps,
    evaluator: Evaluator = evaluate,
) -> AbstractContextManager[Engine]:
    """A run as a simulation, at its start, and what trains and evaluates."""
    job = prepare(config, machine)
    return nullcontext(Simulation(job, job.initial_stack(), phase, evaluator))


def _cluster(config: Config, machine: Machine) -> AbstractContextManager[Engine]:
    try:
        from plait.engines.cluster import Cluster
    except ImportError as error:
        raise ValueError("--engine ray needs Ray: pip install 'plait[ray]'.") from error
    return Cluster(config, machine, partial(prepare, machine=machine))


OpenEngine = Callable[[Config, Machine], AbstractContextManager[Engine]]
"""Prepares a run, and lets go of it at the end."""

ENGINES: dict[str, OpenEngine] = {
    "simulate": simulation,
    "ray": _cluster,
}


def _save(engine: Engine, folder: RunFolder, rounds_done: int) -> None:
    folder.settle()
    engine.save(folder.checkpoint_file, rounds_done)


class Run(Iterator[Event]):
    """An experiment. To iterate over it carries it out; what comes out is its events.

    Attributes:
        config: What is run.
        machine: Where and how fast.
        folder: Its files; None if it is in memory alone.
        events: What it has said so far, with what was recorded before it was resumed.

    Example:
        >>> run = Run(Config(task="trec", rounds=2))  # doctest: +SKIP
        >>> for event in run:  # doctest: +SKIP
        ...     print(event)
        >>> run.summary["accuracy_client_mean"]  # doctest: +SKIP
        >>> model = run.model("mean")  # doctest: +SKIP
    """

    def __init__(
        self,
        config: Config,
        out: Path | str | None = None,
        *,
        resume: bool = False,
        machine: Machine = THIS_MACHINE,
        name: str = "",
        tags: Sequence[str] = (),
        engine: OpenEngine | None = None,
    ) -> None:
        """Nothing is computed or written yet.

        Args:
            config: What to run.
            out: The run folder; without one everything stays in memory.
            resume: Go on from the folder's checkpoint, perhaps with more rounds than it had; a
                folder without one is started anew, and a finished one only yields its events.
            machine: Where and how fast.
            name: What people call it.
            tags: Words to find it by.
            engine: What carries it out; the machine's if not given.

        Raises:
            ValueError: The folder is in use, or belongs to another config.
        """
        self.config, self.machine = config, machine
        self._name, self._tags = name, tags
        self.folder = None if out is None else RunFolder.open(Path(out), config, resume)
        self.events: list[Event] = []
        self._open = engine or lookup(ENGINES, machine.engine, "engine")
        self._engine: Engine | None = None
        self._going = self._carry_out()

    def __next__(self) -> Event:
        """The next event.

        Raises:
            ValueError: The config can't run, training diverged, or workers die again and again.
            OSError: The folder can't be written.
        """
        event = next(self._going)
        self.events.append(event)
        return event

    def _carry_out(self) -> Iterator[Event]:
        folder, config = self.folder, self.config
        if folder:
            folder.check(self.fingerprints)
        if folder and folder.finished(config):
            folder.describe(self._name, self._tags)
            yield from load_finished(folder.path)
            return
        with self._open(config, self.machine) as engine, ExitStack() as until_end:
            self._engine = engine
            done: list[Event] = []
            if folder:
                # Only now: a config that can't run leaves nothing behind.
                make_lasting(folder.path)
                until_end.enter_context(held(folder.path))
                if folder.checkpoint_file.exists():
                    engine.restore(folder.checkpoint_file)
                folder.create(config, self.fingerprints(), made_by(self.machine))
                folder.describe(self._name, self._tags)
                done = folder.rewind(last_evaluation=folder.rounds_before == config.rounds)
            yield from done
            yield from self._rounds(engine, done)
            if folder:
                engine.save_adapters(folder.path / "adapters", self._rounds_done)
                samples = write_samples(folder.path, config)
                folder.finish(summarize(config, self.events) | samples)

    def _rounds(self, engine: Engine, done: list[Event]) -> Iterator[Event]:
        """The rounds that are left; recorded, and saved now and then, where there is a folder."""
        folder, last = self.folder, self.config.rounds - 1
        first = folder.rounds_done if folder else 0
        evaluated = any(isinstance(e, Evaluated) and e.round == first - 1 for e in done)
        due = first > 0 and engine.schedule.after(first - 1) and not evaluated
        if has_stopped(self.config, done):
            return
        for event in all_rounds(engine, first, evaluate_first=due):
            if folder:
                self._keep_best(engine, folder, event)
                # Saved before it is announced: whoever stops listening here can resume from here.
                folder.record(event)
                if isinstance(event, RoundDone) and (
                    self.machine.saves_after(event.round) or event.round == last
                ):
                    _save(engine, folder, event.round + 1)
            yield event
            if isinstance(event, Evaluated) and has_stopped(self.config, self.events):
                if folder:
                    _save(engine, folder, event.round + 1)
                return

    def _keep_best(self, engine: Engine, folder: RunFolder, event: Event) -> None:
        """Write the adapters of a round that is the best so far, where a run may stop early."""
        if self.config.stop_after is None or not isinstance(event, Evaluated):
            return
        if best_evaluation([*self.events, event]) is event:
            engine.save_adapters(folder.best, event.round + 1)

    def fingerprints(self) -> dict[str, str]:
        """What it reads -> a hash of it.

        Raises:
            ValueError: Data that is not there or makes no sense.
        """
        return fingerprints(self.config)

    # -- the result

    @property
    def summary(self) -> dict[str, Any]:
        """The figures of the finished run.

        Raises:
            ValueError: It isn't finished.
        """
        self._need_end()
        if self.folder:
            return load_summary(self.folder.path)
        return summarize(self.config, self.events)

    def model(self, client: Client = "mean") -> PeftModel:
        """A client's model, or the averaged one, ready to use.

        Raises:
            ValueError: The run isn't finished, there is no such client, or the workers of a cluster
                took the state with them.
        """
        with TemporaryDirectory() as scratch:
            adapters = self._adapters(Path(scratch))
            name = client if client == "mean" else f"client-{client}"
            if not (adapters / name).is_dir():
                raise ValueError(
                    f"There is no client {client}; take 0 to {self.config.clients - 1}."
                )
            return PeftModel.from_pretrained(self.base(), str(adapters / name)).eval()

    def predict(
        self, texts: Sequence[Text], client: Client = "mean"
    ) -> list[Prediction] | list[str]:
        """What a client's model, or the averaged one, says of texts; a language model answers.

        Args:
            texts: A string each, or a tuple of two where the task has pairs. To a language model
                it is what a user says.
            client: Whose model; the averaged one for `mean`.

        Raises:
            ValueError: As `model`, or there is no tokenizer.

        Example:
            >>> run.predict(["Who wrote Hamlet?"])[0].label  # doctest: +SKIP
            'HUM'
        """
        model, tokenizer = self.model(client), self.tokenizer()
        if tokenizer is None:
            raise ValueError("This run has no tokenizer; give plait.Trainer the model's.")
        names = self._started.label_names
        if self._started.objective == LANGUAGE.name:
            return answer(model, tokenizer, [*map(str, texts)], self.config.max_new_tokens)
        return predict(model, tokenizer, texts, names, self.config.most_tokens)

    def save(self, out: Path | str) -> None:
        """Write what the run left into a new folder, as if it had been its `out`.

        Raises:
            ValueError: The run isn't finished, or the folder is in use.
            OSError: The folder can't be written.
        """
        folder = RunFolder.open(Path(out), self.config, resume=False)
        with TemporaryDirectory() as scratch:
            adapters = self._adapters(Path(scratch))
            folder.create(self.config, self.fingerprints(), made_by(self.machine))
            folder.describe(self._name, self._tags)
            shutil.copytree(adapters, folder.path / "adapters")
        if self.folder and self.folder.best.is_dir():
            shutil.copytree(self.folder.best, folder.best)
        for event in self.events:
            folder.record(event)
        if self.folder and self.folder.checkpoint_file.exists():
            shutil.copyfile(self.folder.checkpoint_file, folder.checkpoint_file)
        elif self._engine and not self.folder:
            self._engine.save(folder.checkpoint_file, self._rounds_done)
        folder.finish(self.summary)

    def base(self) -> Any:
        """The model without any adapter."""
        return self._loaded().model.eval()

    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._loaded().tokenizer

    @property
    def _started(self) -> Started:
        return next(event for event in self.events if isinstance(event, Started))

    def _loaded(self) -> Loaded:
        started = self._started
        return load_for(self.config, OBJECTIVES[started.objective], started.label_names)

    def _adapters(self, scratch: Path) -> Path:
        """Where the PEFT folders lie; written into `scratch` if they are nowhere yet."""
        self._need_end()
        if self.folder:
            return self.folder.path / "adapters"
        if not isinstance(self._engine, Simulation):
            raise ValueError("The cluster's workers are gone; give the run a folder (out=...).")
        self._engine.save_adapters(scratch, self._rounds_done)
        return scratch

    @property
    def _rounds_done(self) -> int:
        return sum(isinstance(event, RoundDone) for event in self.events)

    def _need_end(self) -> None:
        last = self.config.rounds - 1
        ended = any(isinstance(e, Evaluated) and e.round == last for e in self.events)
        if not ended and not has_stopped(self.config, self.events):
            raise ValueError("The run isn't finished: loop over it first, `for event in run: ...`.")
