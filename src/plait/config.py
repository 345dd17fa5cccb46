"""The complete description of one run: frozen, validated, saved as `config.json`.

`Config` is what decides the numbers: the command line (`plait run --help`), the file format
(`--config run.toml`) and the Python API (`plait.Run(Config(...))`). Its fields come from a class
for each topic, so that what concerns one can be asked for by name: `names_of(ModelSettings)`. A
preset (presets.py) is a function that returns one.

`Machine` is where and how fast it is computed. Nothing in it changes a number on the CPU, so it is
in no digest: a run may go on elsewhere, with smaller chunks, and peers may differ in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from plait.machine.files import read_json
from plait.plugins import plugin_files
from plait.ranks import listed, read_ranks

Head = Literal["frozen", "mixed", "local"]
Pooling = Literal["auto", "model", "mean"]
OptimizerState = Literal["reset_each_round", "reset_each_phase", "keep"]
LrSchedule = Literal["constant", "linear", "cosine"]
Dtype = Literal["float32", "bfloat16", "auto"]
LoadIn = Literal["8bit", "4bit"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Scale = Literal["lora", "rslora", "sfed"]
BaseChange = Literal["mixed", "local"]
Weights = Literal["metropolis", "laplacian", "sequential"]
Split = Literal["validation", "test"]
TestSplit = Literal["common", "client"]
Engine = Literal["simulate", "ray"]
ObjectiveName = Literal["auto", "classification", "regression"]

LANGUAGE_TASKS = ("chat", "snippets", "trec-chat")
"""Those for language models, whose texts are longer by default."""


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """The method: what trains, what travels, and for how long."""

    method: str = "adf"
    """What trains and what travels in each round; `plait methods` lists them."""
    switch_every: int = 5
    """Rounds between switches of the active factor, T (methods that alternate)."""
    frozen_every: int = 1
    """Rounds from one in which ADF-LoRA's frozen factor travels to the next; the first of a phase
    is one. 0: in all, but not before it has ever trained, nor once a graph that averages exactly
    has made it equal at all clients."""
    switch_scale: float = 1.0
    """T in units of 1 / sqrt(1 - rho), c, where a method takes T from the topology."""
    switch_below: float = 0.25
    """With `adf-adaptive` a phase ends when mixing moves the frozen factor less than so much of
    what it moves the active one, at all clients."""
    mix: str = "average"
    """What a client makes of its own factors and its neighbours': `average`, or one that a few
    liars can't steer, such as `trimmed-mean:1`, `clipped-product:0.5`; `plait mixes` lists them."""
    base_rank: int = 32
    """Rank of what `fedex` and `flora` add to the frozen weights, R; what needs more is cut off."""
    base_change: BaseChange = "mixed"
    """Whether that travels and is `mixed`, too, or each client adds to its own, `local`: with fewer
    bytes, and on the complete graph the same."""
    wire: str = "float32"
    """Type of the values in messages. `bfloat16` halves the bytes; `int8` quarters them, with a
    scale for each layer's A and B. What rounding takes off a client's values stays with it where
    factors are averaged.
    `top-k:0.01` sends that share of them, those that changed most since they were sent last
    (CHOCO-SGD), to neighbours that were such in the round before, too; others get all. Values have
    8 bytes then. It is for graphs that stay, and a small share needs a small --gossip-step."""
    rounds: int = 20
    """Rounds: each is local training plus one exchange with the neighbours."""
    seed: int = 0
    """The one seed of the run; every random draw derives from it."""


@dataclass(frozen=True, kw_only=True)
class FileSettings:
    """Where rows lie, and how they are read: peers of a federation may differ in these."""

    glue_dir: str | None = None
    """A folder in the layout of the GLUE archive; without it GLUE comes from the hub."""
    train_file: str | None = None
    """`--task file` and `chat`: training rows, CSV, TSV, JSONL or Parquet; for `chat` a data set on
    the hub, too, `owner/name` or `owner/name:subset`."""
    dev_file: str | None = None
    """`--task file` and `chat`: the rows on which the result is reported. Without it `chat` takes
    a tenth of the training rows."""
    text_columns: str = "text"
    """`--task file`: the text column, or two for pairs: `premise,hypothesis`. `--task chat`: what
    is learned, if its column has no known name; or what the user says and what is answered,
    `question,answer`."""
    label_column: str = "label"
    """`--task file`: the column with the label. `--task chat`: the column with the group of a row,
    such as its category, to be dealt by as by a label; there need not be one."""
    key_column: str | None = None
    """`--task file` and `chat`: the column that names the natural client of a row."""
    encoding: str | None = None
    """What text files without a byte order mark are written in, such as `cp1252`; UTF-8 when not
    given."""
    delimiter: str | None = None
    """The character between the fields of CSV and TSV, or `tab`; found by the header when not
    given."""
    skip_bad_rows: bool = False
    """Leave out rows of files that can't be read, and say which, instead of refusing."""
    plugin: str | None = None
    """A Python file of yours that adds methods, tasks, topologies, partitions or mixes; again, or
    with commas, for more."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The task and how its rows are dealt to clients."""

    task: str = "demo"
    """The data set; `plait tasks` lists them. `file` is your own data, and `chat` your own for a
    language model."""
    objective: ObjectiveName = "auto"
    """`--task file`: what labels are, classes as they are written, or scores. `auto` takes numbers
    for scores if some are fractions and there are too many for classes, and says so."""
    max_length: int | None = None
    """Longer texts are cut to this number of tokens: if not given, to 1024 by `chat` and the other
    tasks for language models, and to 128 by all others."""
    clients: int = 10
    """Number of clients, N."""
    label_skew: str | None = None
    """How rows are dealt to clients: `paper`, `iid`, `dirichlet:0.5`, `shards:2`, `sizes:100,50`,
    `key`, or a JSON file with one label mixture for each client. If not given, `paper` where rows
    have labels, else `key` with `--key-column`, else `iid`."""
    client_size: int | None = None
    """Rows for each client; as many as there are when not given."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The frozen model, its head and the adapters."""

    backbone: str = "minilm"
    """`minilm` (the embedded encoder), `smollm2` (the embedded language model), a model
    folder, or a name on the Hugging Face hub."""
    pooling: Pooling = "auto"
    """What the classifier sees: the model's own head, or the normalised mean of the last hidden
    states with a linear layer. `auto` takes `mean` where the checkpoint has no head to freeze."""
    head: Head | None = None
    """Classifier head: `frozen` as in the paper, trained and `mixed`, or trained and `local`.
    The default is `frozen` with the model's own head and `mixed` with mean pooling."""
    rank: int = 8
    """LoRA rank, r."""
    ranks: str | None = None
    """Ranks of the clients, by turns, `4,8,16`, or a file with one on each line; `rank` is then the
    largest, and all have its scale. In Python and TOML a list, too."""
    alpha: float = 16.0
    """LoRA scale: the update is (alpha / r) B A, or what `scale` says."""
    scale: Scale = "lora"
    """What B A is multiplied with: `lora`, alpha / r; `rslora`, alpha / sqrt(r); `sfed`, alpha
    sqrt(N / r), with which what is averaged over N clients doesn't get too small (SFed-LoRA)."""
    lora_dropout: float = 0.0
    """Dropout on the input of the LoRA branch."""
    target_modules: str | None = None
    """Linear layers to adapt, comma-separated; PEFT's default for the architecture if not given."""
    top_layers: int | None = None
    """Adapt only the last so many layers; the ones below are computed once for each text."""
    dtype: Dtype = "float32"
    """Type of the frozen weights; the factors are always float32. `auto` takes bfloat16 where the
    device multiplies in it, which is about twice as fast."""
    load_in: LoadIn | None = None
    """Keep the linear layers of the frozen model in so many bits, once for all clients: int8 with a
    scale for each row, or NF4 with one for 64 entries. Computed in --dtype."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Local training."""

    local_steps: int = 8
    """Optimizer steps of each client in a round, K."""
    batch_size: int = 16
    """Rows of a client in a step."""
    lr: float = 1e-3
    """Learning rate of the LoRA factors."""
    head_lr: float = 1e-2
    """Learning rate of a trained head."""
    lr_schedule: LrSchedule = "constant"
    """How both go over the rounds, from their full value to their end in the last round."""
    lr_end: float | None = None
    """What --lr is in the last round (linear, cosine), a tenth of it if not given. The head's rate
    keeps its proportion to --lr, and so does this where a comparison takes another --lr."""
    warmup_rounds: int = 0
    """Rounds before the learning rates are full; they rise by equal steps."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    clip_norm: float | None = 1.0
    """Each client's gradient is scaled down to this norm; `None` for no clipping."""
    optimizer_state: OptimizerState = "reset_each_round"
    """When AdamW's moments start anew."""


@dataclass(frozen=True, kw_only=True)
class PrivacySettings:
    """Differential privacy."""

    dp_clip: float | None = None
    """Differential privacy: a client's change of a round, over all factors that travel, is scaled
    down to this L2 norm before noise is added; no privacy if not given."""
    dp_noise: float | None = None
    """Standard deviation of the noise in units of `dp_clip`, z."""
    dp_delta: float = 1e-5
    """Probability with which the bound epsilon, told at the end, may fail."""


@dataclass(frozen=True, kw_only=True)
class TopologySettings:
    """Who meets whom, and with what weight."""

    topology: str = "pairs"
    """Who meets whom; `plait topologies` lists them."""
    p: float = 0.1
    """Probability of an edge (`pairs`, `erdos_renyi`), or that one is rewired (`small_world`)."""
    degree: int | None = None
    """Neighbours of a client: in a round at most (`base`), 1 if not given; in all rounds
    (`regular`, `small_world`, `equistatic`), 4 if not given."""
    radius: float = 0.2
    """How near clients meet, in sides of the square that they walk about (`mobility`)."""
    weights: Weights = "metropolis"
    """Mixing weights of a graph."""
    gossip_step: float = 1.0
    """How far a client goes towards its neighbours in a round, gamma: W is (1 - gamma) I + gamma W.
    With `--wire top-k` and a small share, 1 may be too far, so that clients drift apart."""
    edges_file: str | None = None
    """`--topology file`: an edge list, or a contact trace with a round for each line."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is evaluated, and when."""

    eval_every: int | None = None
    """Rounds between evaluations; before the first and after the last there always is one. If not
    given, as often as takes less than a quarter of the run, or never between if that can't be."""
    eval_rows: int | None = None
    """Evaluate on so many rows between the first and the last round. If not given, on all of them,
    or where `eval_every` isn't given either on at most 256."""
    options: str | None = None
    """`--task chat`: the answers to choose among, `yes,no`, or the column that lists those of each
    row. The score is then how often the right one is the likeliest, `option-accuracy`."""
    generate_rows: int = 0
    """Language models: so many held-out prompts are answered at the end, by the base and by the
    averaged model (`samples.jsonl` in the run folder), and compared with their answers."""
    max_new_tokens: int = 128
    """An answer ends after so many tokens, if not before."""
    eval_split: Split = "test"
    """The rows that are reported. `validation` is for choosing settings."""
    test_split: TestSplit = "common"
    """`client`: where all rows are evaluated, each client is judged on rows of its own as well, as
    many as have its mixture of labels, or with `--label-skew key` those of its key; then `dev_file`
    must have the key column, too."""
    stop_after: int | None = None
    """Stop after so many evaluations without gain in the clients' mean score, and keep the best
    round's adapters in the run folder's `best/`; it needs `--eval-split validation` and
    `--eval-every`."""
    metric: str | None = None
    """What answers are judged by: `accuracy`, `macro-f1`, `auroc`, `matthews`, for two classes
    `f1`, for scores `pearson`; the task's own when not given."""


# Dataclasses take the fields of their last base first.
@dataclass(frozen=True, kw_only=True)
class Config(
    EvaluationSettings,
    TopologySettings,
    PrivacySettings,
    TrainingSettings,
    ModelSettings,
    FileSettings,
    DataSettings,
    MethodSettings,
):
    """One run: a method, a task, a partition, a topology and the settings of local training."""

    def __post_init__(self) -> None:
        """Refuse what cannot run, with the reason and the fix."""
        if self.plugin:  # the run may go on from another folder
            object.__setattr__(self, "plugin", ",".join(map(str, plugin_files(self.plugin))))
        if self.ranks is not None:
            self._take_ranks(self.ranks)
        for name in (
            "rounds",
            "clients",
            "local_steps",
            "batch_size",
            "rank",
            "switch_every",
            "base_rank",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        _at_least_one(
            self, "eval_every", "eval_rows", "client_size", "top_layers", "stop_after",
            "max_new_tokens", "max_length", "degree",
        )  # fmt: skip
        if self.generate_rows < 0:
            raise ValueError(f"generate_rows is {self.generate_rows}; it can't be below 0.")
        if self.frozen_every < 0:
            raise ValueError(f"frozen_every is {self.frozen_every}; it can't be below 0.")
        _check_stopping(self)
        for name in ("lr", "head_lr", "alpha", "switch_scale", "switch_below", "radius"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0.")
        if self.lr_end is not None and (self.lr_schedule == "constant" or self.lr_end < 0):
            raise ValueError(
                f"lr_end is {self.lr_end} and lr_schedule {self.lr_schedule}; give 0 or more, and "
                "linear or cosine."
            )
        if not 0 <= self.warmup_rounds < self.rounds:
            raise ValueError(
                f"warmup_rounds is {self.warmup_rounds}; it must be below rounds, {self.rounds}."
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm is {self.clip_norm}; it must be above 0, or None.")
        if (self.dp_clip is None) != (self.dp_noise is None):
            raise ValueError("dp_clip and dp_noise belong together: give both, or neither.")
        for name in ("dp_clip", "dp_noise"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be above 0, or left out.")
        if not 0 < self.dp_delta < 1:
            raise ValueError(f"dp_delta is {self.dp_delta}; it lies between 0 and 1.")
        if not 0 < self.gossip_step <= 1:
            raise ValueError(
                f"gossip_step is {self.gossip_step}; it must be above 0, and at most 1."
            )
        if not 0 <= self.p <= 1:
            raise ValueError(f"p is {self.p}; a probability lies between 0 and 1.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; it must be in [0, 1).")

    def _take_ranks(self, given: str) -> None:
        """Keep the numbers themselves, with the largest as `rank`; equal ones are no list."""
        ranks = read_ranks(given)
        same = len(set(ranks)) == 1
        object.__setattr__(self, "ranks", None if same else ",".join(map(str, ranks)))
        object.__setattr__(self, "rank", max(ranks))

    def rank_of(self, client: int) -> int:
        """The rank of a client's adapter."""
        ranks = listed(self.ranks) if self.ranks else (self.rank,)
        return ranks[client % len(ranks)]

    @property
    def lora_alpha(self) -> float:
        """What divided by the rank is the scale of B A, as PEFT has it."""
        roots = {"lora": 1, "rslora": self.rank, "sfed": self.clients * self.rank}
        return self.alpha * math.sqrt(roots[self.scale])

    @property
    def most_tokens(self) -> int:
        """What texts are cut to: `max_length`, or the task's default."""
        return self.max_length or default_length(self.task)

    def to_json(self) -> dict[str, Any]:
        """The config as plain JSON values."""
        return dataclasses.asdict(self)

    def decisive(self) -> dict[str, Any]:
        """What digests are made of: all but settings that came later and aren't set.

        `max_length` is the task's default if it isn't given. Where GLUE lies is left open: it holds
        the same rows wherever it is unpacked.
        """
        values = self.to_json() | {"max_length": self.most_tokens, "glue_dir": None}
        unset = {name for name in CAME_LATER if values[name] == getattr(Config, name)}
        return {name: value for name, value in values.items() if name not in unset}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Config:
        """The config of `to_json`; an unknown key is a `ValueError`."""
        unknown = sorted(set(values) - names_of(cls) - names_of(Machine))
        if unknown:
            raise ValueError(f"Unknown settings: {', '.join(unknown)}. `plait run --help` has all.")
        # The `config.json` of plait before 0.2 has the machine's settings among its own, and one of
        # before language models has `max_length` whether or not it was given.
        config = cls(**{name: value for name, value in values.items() if name in names_of(cls)})
        usual = config.max_length == default_length(config.task)
        return dataclasses.replace(config, max_length=None) if usual else config

    @classmethod
    def load(cls, file: Path) -> Config:
        """The config in a file that plait wrote.

        Raises:
            ValueError: It is damaged, or of another plait; the message has the file.
            OSError: It can't be read.
        """
        values = read_json(file)
        try:
            return cls.from_json(values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: {error}") from error

    def digest(self) -> str:
        """Sixteen hex digits that are equal when and only when `decisive` is."""
        text = json.dumps(self.decisive(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and how fast a run is computed."""

    device: Device = "auto"
    """Where to compute; `auto` takes CUDA, then MPS, then the CPU."""
    cache_gib: float = 2.0
    """Memory for what the layers below the first adapted one (`--top-layers`) make of the texts;
    computed anew in every step when it takes more."""
    chunk_tokens: int | None = None
    """About so many tokens are computed at once by each core or by a graphics card. If not given,
    2048 by a core, in whose cache they stay, or fewer of a large model; 32768 by a card, if half
    its free memory will do."""
    memory_gib: float | None = None
    """Memory for the clients' state and local training, beside the model; chunks get smaller and
    fewer at once where they need more, and if one client's batch does, layers are computed twice.
    Not limited when not given."""
    save_every: int = 10
    """Rounds between checkpoints."""
    backend: str | None = None
    """How to compute: `kernels`, `operators`, `accelerator`, or `slow`, which is plain, for
    debugging; the fastest that is there when not given."""
    engine: Engine = "simulate"
    """Compute in this process, or on a Ray cluster: RAY_ADDRESS's, or one started here."""
    workers: int | None = None
    """`--engine ray`: the number of workers, one for each GPU or for every few cores."""

    def __post_init__(self) -> None:
        """Refuse what cannot be, with the fix."""
        _at_least_one(self, "chunk_tokens", "save_every", "workers")
        if self.memory_gib is not None and not self.memory_gib > 0:
            raise ValueError(f"memory_gib is {self.memory_gib}; it must be above 0, or left out.")
        if self.workers is not None and self.engine == "simulate":
            raise ValueError("--workers is for --engine ray; a simulation is one process.")

    def saves_after(self, round_: int) -> bool:
        """Whether a checkpoint is due after round `round_`, counted from 0."""
        return (round_ + 1) % self.save_every == 0


CAME_LATER = (
    "load_in", "ranks", "scale", "wire", "frozen_every", "switch_scale", "degree", "radius",
    "base_rank", "base_change", "switch_below", "gossip_step",
)  # fmt: skip
"""Settings that earlier versions hadn't; where they aren't set, digests are what they were."""


def default_length(task: str) -> int:
    """What a task's texts are cut to if nothing is said."""
    return 1024 if task in LANGUAGE_TASKS else 128


def names_of(kind: type) -> frozenset[str]:
    """The names of the settings that a class of this module has."""
    return frozenset(field.name for field in dataclasses.fields(kind))


def _check_stopping(config: Config) -> None:
    judged = config.eval_split == "validation" and config.eval_every is not None
    if config.stop_after is not None and (not judged or config.eval_rows is not None):
        raise ValueError(
            "stop_after counts evaluations on all validation rows: pass --eval-split validation "
            "and --eval-every 1, or more, without eval_rows (--eval-rows None)."
        )


def _at_least_one(settings: Config | Machine, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1, or left out.")


THIS_MACHINE = Machine()
"""What suits the machine that one is on."""
