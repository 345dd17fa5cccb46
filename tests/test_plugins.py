"""Files of one's own that add rows: on the command line, in other processes, and when run again."""

from __future__ import annotations

import json
import sys

import pytest

from plait.cli.main import main
from plait.config import Config
from plait.data.partition import PARTITIONS
from plait.data.tasks import TASKS
from plait.experiments.plan import load_plan
from plait.methods import METHODS
from plait.mixing import MIXES
from plait.plugins import load_plugins
from plait.runs.run_folder import load_config
from plait.topology import TOPOLOGIES

PLUGIN = """
from plait.methods import AB, METHODS, A, Method, always

METHODS["only-a"] = lambda _config: Method(
    summary="both train, only A is mixed", train=always(AB), share=always(A)
)
"""
QUICK = [
    "--task=file", "--clients=2", "--rounds=1", "--local-steps=1", "--batch-size=2",
    "--top-layers=1", "--label-skew=iid", "--topology=complete", "--device=cpu",
]  # fmt: skip


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A plugin in the working folder; tables and modules are put back at the end."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    before = [(table, dict(table)) for table in (METHODS, TASKS, TOPOLOGIES, PARTITIONS, MIXES)]
    modules = set(sys.modules)
    yield file
    forget(before, modules)


def forget(tables, modules):
    for table, rows in tables:
        table.clear()
        table.update(rows)
    for name in set(sys.modules) - modules:
        if name.startswith("plait_plugin:"):
            del sys.modules[name]


@pytest.fixture
def data(tmp_path):
    for name, count in (("train", 24), ("dev", 8)):
        rows = [f"{name} {'who' if i % 2 else 'where'} number {i},{i % 2}" for i in range(count)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return [*QUICK, f"--train-file={tmp_path}/train.csv", f"--dev-file={tmp_path}/dev.csv"]


def test_its_rows_are_listed(plugin, capsys):
    assert main(["methods"]) == 0
    assert "only-a" not in capsys.readouterr().out
    assert main(["methods", "--plugin", "mine.py"]) == 0
    assert "only-a" in capsys.readouterr().out


def test_it_is_run_once_and_several_may_be_given(plugin, tmp_path, capsys):
    plugin.write_text(PLUGIN + "with open('times.txt', 'a') as file:\n    file.write('x')\n")
    other = tmp_path / "other.py"
    other.write_text(PLUGIN.replace("only-a", "second"))
    assert main(["methods", "--plugin=mine.py", "--plugin", "other.py"]) == 0
    assert main(["methods", "--plugin=mine.py,other.py"]) == 0
    said = capsys.readouterr().out
    assert said.count("only-a") == said.count("second") == 2
    assert (tmp_path / "times.txt").read_text() == "x"


def test_a_run_remembers_it(plugin, data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    begin = dict(METHODS), set(sys.modules)
    assert main(["run", *data, "--plugin=mine.py", "--method=only-a", f"--out={out}"]) == 0
    assert load_config(out).plugin == str(plugin)
    forget([(METHODS, begin[0])], begin[1])
    monkeypatch.chdir(out)
    again = ["run", "--config=config.json", "--device=cpu", f"--out={out}", "--resume"]
    assert main([*again, "--rounds=2"]) == 0
    assert json.loads((out / "summary.json").read_text())["method"] == "only-a"


def test_a_comparisons_processes_read_it_too(plugin, data, tmp_path):
    out = tmp_path / "cmp"
    begin = dict(METHODS), set(sys.modules)
    args = ["compare", *data, "--plugin=mine.py", "--methods=only-a,local", "--seeds=0"]
    assert main([*args, "--jobs=2", f"--out={out}"]) == 0
    forget([(METHODS, begin[0])], begin[1])
    assert load_plan(out).methods == ("only-a", "local")
    assert "only-a" in METHODS


def test_a_sweep_takes_it_by_its_file_or_by_a_flag(plugin, data, tmp_path):
    pairs = (word.removeprefix("--").split("=") for word in data)
    lines = [f"{name.replace('-', '_')} = {value if value.isdecimal() else json.dumps(value)}"
             for name, value in pairs]  # fmt: skip
    file = tmp_path / "grid.toml"
    file.write_text("\n".join(['methods = ["only-a"]', "seeds = [0]", "[settings]", *lines]))
    assert main(["sweep", str(file), f"--out={tmp_path / 'a'}", "--jobs=1"]) == 1
    args = ["--plugin=mine.py", "--jobs=1"]
    assert main(["sweep", str(file), f"--out={tmp_path / 'b'}", *args]) == 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.py", None, "There is no plugin .*none.py; give --plugin a Python file"),
        ("bad.py", "1 / 0", "bad.py fails: ZeroDivisionError: division by zero"),
        ("bad.txt", "", "bad.txt is not a Python file"),
    ],
)
def test_one_that_cannot_be_read_says_why(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    for _ in range(2):  # it isn't taken for loaded
        with pytest.raises(ValueError, match=message):
            load_plugins(str(tmp_path / name))


def test_its_path_holds_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config(plugin="a.py, b.py")
    assert config.plugin == f"{tmp_path}/a.py,{tmp_path}/b.py"
    assert Config.from_json(config.to_json()) == config
