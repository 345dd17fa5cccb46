from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from plait.config import Config
from plait.contact_traces import read_contacts
from plait.data import sources
from plait.data.partition import deal
from plait.data.sources import check_files, read_file
from plait.data.tasks import Rows, Task, load_task
from plait.machine.text_files import read_text
from plait.presets import read_settings

CODES = {
    "dotted": ("1.1", "1.10", "2.3"),
    "zeros": ("007", "07", "010"),
    "exponents": ("3E1", "1E5", "100000"),
    "signs": ("+1", "1", "2"),
    "beyond 2^53": ("9007199254740992", "9007199254740993", "9007199254740995"),
    "whole": ("1", "1.0", "2"),
    "words": ("1", "10", "9a", "NA", "True"),
    "bases": ("0x10", "16", "1_6"),
    "beyond floats": ("1e400", "1e401", "2"),
    "zeros with a sign": ("-0", "+0", "0"),
    "digits of others": ("\u0661", "1", "\u00b9"),
}
KINDS = ("csv", "tsv", "jsonl", "parquet")


@pytest.fixture(autouse=True)
def nothing_said():
    sources._SAID.clear()


def write(path: Path, rows: list[tuple[str, object]]) -> str:
    frame = pd.DataFrame(rows, columns=["text", "label"])
    match path.suffix:
        case ".csv":
            frame.to_csv(path, index=False)
        case ".tsv":
            frame.to_csv(path, index=False, sep="\t")
        case ".jsonl":
            path.write_text("\n".join(json.dumps({"text": t, "label": x}) for t, x in rows))
        case ".parquet":
            pytest.importorskip("pyarrow", reason="comes with plait[glue]")
            frame.to_parquet(path)
    return str(path)


def own(tmp_path: Path, labels: list, dev: list, kind: str = "csv", **settings: object) -> Task:
    train = [(f"text {i}", label) for i, label in enumerate(labels)]
    files = [
        write(tmp_path / f"train.{kind}", train),
        write(tmp_path / f"dev.{kind}", [(f"dev {i}", label) for i, label in enumerate(dev)]),
    ]
    return load_task(Config(task="file", train_file=files[0], dev_file=files[1], **settings))


def texts_and_labels(file: Path, **how: object) -> list[tuple[str, str]]:
    return [(x.texts[0], str(x.label)) for x in read_file(str(file), ["text"], "label", **how)]


# -- labels are what is written


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", CODES.values(), ids=CODES)
def test_labels_are_what_is_written(tmp_path, names, kind):
    task = own(tmp_path, [*names] * 12, [*names], kind)
    assert sorted(task.label_names) == sorted(names)
    assert [task.label_names[i] for i in task.test.labels] == [*names]


def test_numbers_of_json_are_the_text_in_the_file(tmp_path):
    file = tmp_path / "x.jsonl"
    labels = ("1.10", "1.1", "1E5", "9007199254740993", '"1.10"')
    file.write_text("\n".join(f'{{"text": "a", "label": {label}}}' for label in labels))
    assert [x for _, x in texts_and_labels(file)] == [*labels[:4], "1.10"]


def test_labels_of_parquet_do_not_depend_on_their_type(tmp_path):
    pytest.importorskip("pyarrow", reason="comes with plait[glue]")
    wanted = {"int": ["1", "2"], "float": ["1", "2.5"], "small": ["0.1", "2"], "kind": ["a", "b"]}
    columns = {
        "int": [1, 2],
        "float": [1.0, 2.5],
        "small": np.array([0.1, 2], np.float32),
        "kind": pd.Categorical(["a", "b"]),
    }
    pd.DataFrame({"text": ["a", "b"], **columns}).to_parquet(tmp_path / "x.parquet")
    for column, labels in wanted.items():
        rows = read_file(str(tmp_path / "x.parquet"), ["text"], column)
        assert [x.label for x in rows] == labels


def test_classes_have_one_order_in_every_process(tmp_path):
    code = (
        "from plait.data.tasks import _label_names;"
        "print(_label_names(['010', 'b', '07', '10', '007', '+7', 'B', '9.5']))"
    )
    orders = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert orders == {"('+7', '007', '07', '9.5', '010', '10', 'B', 'b')\n"}


def test_a_class_of_train_may_have_its_point_zero_in_dev_alone(tmp_path):
    task = own(tmp_path, ["0.0", "1.0"] * 10, ["1", "0", "1.00"])
    assert task.label_names == ("0.0", "1.0")
    assert task.test.labels.tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match=r"train_file has not: '07'.*'007', '010'"):
        own(tmp_path, ["007", "010"] * 10, ["07"])


SCORES = [f"{i * 37 % 100 / 20 + 0.01:.2f}" for i in range(60)]


@pytest.mark.parametrize(
    ("labels", "objective", "regression", "said"),
    [
        (SCORES, "auto", True, "taken for scores, a regression. For classes pass --objective"),
        (SCORES[:6], "auto", True, "taken for scores"),
        (["1.1", "1.10", "2.3"] * 10, "auto", False, "classes, as they are written. For scores"),
        (["0.5", "1.0", "1.5"] * 10, "auto", False, "For scores pass --objective regression"),
        ([f"{i}.{j}" for i in range(6) for j in (1, 10, 2)] * 2, "auto", False, "classes"),
        ([f"00{i}.5" for i in range(30)], "auto", False, "classes"),
        ([str(i % 40) for i in range(80)], "auto", False, ""),
        (SCORES, "classification", False, ""),
        (["1", "2"] * 10, "regression", True, ""),
    ],
)
def test_a_regression_is_asked_for_or_said(tmp_path, caplog, labels, objective, regression, said):
    task = own(tmp_path, labels, labels[:2], objective=objective)
    assert (task.label_names == ()) == regression
    assert task.metric == ("pearson" if regression else "accuracy")
    assert (said in caplog.text) if said else (not caplog.text)


@pytest.mark.parametrize("label", ["nan", "1_000", "inf", "4,83", "good"])
def test_a_score_is_a_number(tmp_path, label):
    with pytest.raises(ValueError, match=f"label '{label}' is not a number"):
        own(tmp_path, SCORES, [label])


def test_many_numbers_of_which_dev_has_others_may_be_scores(tmp_path):
    with pytest.raises(ValueError, match=r"not: '99'.*If they are scores, pass --objective regr"):
        own(tmp_path, [str(i) for i in range(30)], ["99"])


# -- one value for each cell


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "label": ["x", "y"]}, "1 of 4 rows have a list as 'label', where one"),
        ({"text": "a", "label": [1, 0]}, "a list as 'label'"),
        ({"text": "a", "label": {"x": 1}}, "an object as 'label'"),
        ({"text": ["a", "b"], "label": "x"}, "a list as 'text'"),
        ({"text": "a", "label": "x", "site": ["n"]}, "a list as 'site'"),
        ({"text": True, "label": "x"}, "true or false as 'text'"),
        ({"text": "a"}, "1 of 4 rows have no 'label': line 5"),
        ({"text": "a", "label": float("nan")}, "have no 'label': line 5"),
        ({"text": "a\ud83d", "label": "x"}, "half a character as 'text'"),
        (["a", "x"], "are not JSON objects, such as .*: line 5"),
    ],
)
def test_each_cell_holds_one_value(tmp_path, row, message):
    file = tmp_path / "x.jsonl"
    good = [{"text": "b", "label": "x", "site": "s"}] * 3
    file.write_text("\n" + "\n".join(map(json.dumps, (*good, row))))
    with pytest.raises(ValueError, match=f"x.jsonl: .*{message}"):
        read_file(str(file), ["text"], "label", "site")


def test_lists_of_parquet_are_refused(tmp_path):
    pytest.importorskip("pyarrow", reason="comes with plait[glue]")
    pd.DataFrame({"text": ["a"], "label": [["x"]]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"a list as 'label', .*: row 1"):
        read_file(str(tmp_path / "x.parquet"), ["text"], "label")


@pytest.mark.parametrize(
    "label", ["['fruit', 'tool']", '["fruit"]', "[1, 0]", "[1 0]", "{'a': 1}", "('a', 'b')", "[]"]
)
def test_a_list_that_was_written_into_a_text_is_no_class(tmp_path, label):
    file = write(tmp_path / "x.csv", [("a", "x"), ("b", label)])
    with pytest.raises(ValueError, match=r"1 of 2 rows have a list as 'label', .*: line 3"):
        texts_and_labels(Path(file))


def test_a_name_in_brackets_is_a_class(tmp_path):
    names = ("(other)", "[NER]", "{a}")
    assert own(tmp_path, [*names] * 8, ["[NER]"]).label_names == names


def test_classes_that_are_several_of_the_others_are_named(tmp_path, caplog):
    names = ("a|b", "b; c", "a", "b", "c", "a/b", "x|y")
    assert len(own(tmp_path, [*names] * 8, ["c"]).label_names) == 7
    assert "'a|b', 'b; c' of train_file are classes of their own" in caplog.text


@pytest.mark.parametrize("name", ["nan", "NULL", "N/A", "none"])
def test_a_class_that_may_stand_for_nothing_is_named(tmp_path, caplog, name):
    assert set(own(tmp_path, [name, "a"] * 8, ["a"]).label_names) == {name, "a"}
    assert f"{name!r} of train_file is a class" in caplog.text


def test_true_and_false_are_classes_but_not_beside_others(tmp_path):
    assert own(tmp_path, [True, False] * 9, [True], "jsonl").label_names == ("False", "True")
    with pytest.raises(ValueError, match=r"train.jsonl, line 1: the 'label' is true or false"):
        own(tmp_path, [True, 0] * 9, [True], "jsonl")


@pytest.mark.parametrize(
    "names",
    [
        ("billing", "BILLING", "other"),
        ("billing", "billing ", "other"),
        ("caf\u00e9", "cafe\u0301", "other"),
        ("a b", "a\u00a0 b", "other"),
        ("1", "1.0", "other"),
    ],
)
def test_classes_that_look_alike_are_named(tmp_path, caplog, names):
    assert len(own(tmp_path, [*names] * 8, ["other"]).label_names) == 3
    (line,) = caplog.messages
    assert "different classes" in line
    assert all(repr(name) in line for name in names[:2])
    assert "other" not in line


# -- columns


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("text,label,site\na,x,n,\nb,y,s,\n", "ax by"),
        ("text,label,site,\na,x,n,\nb,y,s\n", "ax by"),
        ("text,label,site,\na,x,n\nb,y,s\n", "ax by"),
        ("text,label\n,,,\na,x\n \n,\nb,y\n", "ax by"),
        (",text,label\n0,a,x\n1,b,y\n", "ax by"),
        ("text;label\na;x\nb;y\n", "ax by"),
        ("label|n|text\nx|1|a\ny|2|b\n", "ax by"),
        ("text\tlabel\na\tx\nb\ty\n", "ax by"),
        ("\r\ntext,label\r\na,x\r\nb,y\r\n", "ax by"),
        ("text,label\ra,x\rb,y\r", "ax by"),
        ("sep=;\ntext;label\na, c;x\nb;y\n", "a, cx by"),
    ],
)
def test_columns_are_as_the_header_says(tmp_path, content, wanted):
    file = tmp_path / "x.csv"
    file.write_bytes(content.encode())
    assert " ".join(text + label for text, label in texts_and_labels(file)) == wanted


@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0,a,x", "1 of 3 rows have 3 fields where the header names 2 columns: line 3"),
        ("a, b,x", "have 3 fields"),
        ("a", "have 1 field where the header names 2"),
        ("a,", "have no 'label': line 3"),
        (",x", "have no 'text': line 3"),
        ("text,label", "are the header again"),
        ("\ufefftext,label", "are the header again"),
    ],
)
def test_a_row_with_other_fields_is_refused_by_line(tmp_path, caplog, name, row, message):
    file = tmp_path / name
    content = f"text,label\nb,x\n{row}\nc,y\n"
    file.write_text(content.replace(",", "\t") if name == "x.tsv" else content)
    with pytest.raises(ValueError, match=f"{name}: .*{message}.*Correct them.*--skip-bad-rows"):
        texts_and_labels(file)
    assert texts_and_labels(file, skip_bad_rows=True) == [("b", "x"), ("c", "y")]
    assert "1 of 3 rows" in caplog.text
    assert "left out" in caplog.text


def test_pairs_never_train_on_the_label(tmp_path):
    (tmp_path / "x.csv").write_text("a,b,label\np0,h0,yes,north\np1,h1,no,south\n")
    with pytest.raises(ValueError, match=r"2 of 2 rows have 4 fields .* 3 columns: lines 2, 3"):
        read_file(str(tmp_path / "x.csv"), ["a", "b"], "label")


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl"])
def test_a_column_may_not_have_a_namesake_or_be_missing(tmp_path, name):
    (tmp_path / "x.csv").write_text("text;text;label\na;b;x\n")
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"more than one column 'text'|no column 'label'"):
        texts_and_labels(tmp_path / name)


def test_a_delimiter_can_be_given(tmp_path):
    (tmp_path / "x.csv").write_text("text^label\na^x\n")
    assert texts_and_labels(tmp_path / "x.csv", delimiter="^") == [("a", "x")]
    (tmp_path / "x.csv").write_text("text\tlabel\na\tx\n")
    assert texts_and_labels(tmp_path / "x.csv", delimiter="tab") == [("a", "x")]
    with pytest.raises(ValueError, match="delimiter is '::'; give one character, or tab"):
        texts_and_labels(tmp_path / "x.csv", delimiter="::")


# -- quotes


ROWS = [f"ask for a number {i},{'xy'[i % 2]}" for i in range(40)]
PLAIN = [tuple(row.split(",")) for row in ROWS]


@pytest.mark.parametrize("label", ["", "score"])
@pytest.mark.parametrize("first", [0, 5, 38])
@pytest.mark.parametrize("last", [6, 39, None])
def test_a_stray_quote_swallows_no_rows(tmp_path, caplog, first, last, label):
    rows = [f"{row[:-1]}{i}.5" if label else row for i, row in enumerate(ROWS)]
    broken = rows.copy()
    broken[first] = '"' + rows[first]
    if last is not None and last > first:
        text, comma, name = rows[last].rpartition(",")
        broken[last] = f'{text}"{comma}{name}'
    file = tmp_path / "x.csv"
    file.write_text("\n".join(["text,label", *broken]))
    with pytest.raises(
        ValueError, match=f"1 of 40 rows have a stray quotation .*: line {first + 2}"
    ):
        texts_and_labels(file)
    read = texts_and_labels(file, skip_bad_rows=True)
    wanted = [tuple(row.rsplit(",", 1)) for i, row in enumerate(rows) if i != first]
    assert [(text.replace('"', ""), name) for text, name in read] == wanted
    assert "1 of 40 rows have a stray" in caplog.text


@pytest.mark.parametrize(
    "read",
    [
        lambda file: sources.read_texts(file, ["text"]),
        lambda file: sources.read_prompts(file, "text"),
        lambda file: sources.read_chat(Config(task="chat", train_file=file), "train_file"),
    ],
)
def test_a_stray_quote_swallows_no_rows_where_there_are_no_labels(tmp_path, read):
    rows = [f"ask for {k},number {k}" for k in range(40)]
    file = tmp_path / "x.csv"
    file.write_text("\n".join(["text,n", *rows]))
    assert len(read(str(file))) == 40
    rows[3], rows[33] = f'"{rows[3]}', rows[33].replace(",", '",')
    file.write_text("\n".join(["text,n", *rows]))
    with pytest.raises(ValueError, match=r"1 of 40 rows have a stray quotation mark.*: line 5"):
        read(str(file))
    # Of several lines as well, and not one of them looks as if it were several rows.
    rows[3:34] = ['"a, b\nc, d\ne, f\n\nAnn",x', '"a, b\nc, d\ne, f\nAnn",x']
    file.write_text("\n".join(["text,n", *rows]))
    assert len(read(str(file))) == 11


@pytest.mark.parametrize(
    "text",
    [
        "Dear Bob,\nAnn", "one\n\ntwo, three\n", 'say ""yes"", or\nno', "5 pipes, 3\nand 2,x",
        "a\r\nb", "Hi,\nfine,\nbye",
    ],
)  # fmt: skip
def test_a_text_may_have_several_lines(tmp_path, text):
    file = tmp_path / "x.csv"
    file.write_bytes("\n".join(["text,label", *ROWS, f'"{text}",x', ROWS[0]]).encode())
    assert texts_and_labels(file)[-2:] == [(text.replace('""', '"'), "x"), PLAIN[0]]


def test_a_quote_within_a_text_and_a_long_text_are_read(tmp_path):
    file = tmp_path / "x.csv"
    long = "word " * 50_000
    file.write_text(f'text,label\n5" pipe,x\n{long},y\n')
    assert texts_and_labels(file) == [('5" pipe', "x"), (long, "y")]


# -- encodings


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_file_may_begin_with_a_mark(tmp_path, encoding, end):
    def written(name: str, text: str) -> Path:
        (tmp_path / name).write_bytes(text.replace("\n", end).encode(encoding))
        return tmp_path / name

    rows = [("caf\u00e9", "x"), ("th\u00e9", "y")]
    assert texts_and_labels(written("a.csv", "text,label\ncaf\u00e9,x\nth\u00e9,y\n")) == rows
    assert texts_and_labels(written("a.tsv", "text\tlabel\ncaf\u00e9\tx\nth\u00e9\ty\n")) == rows
    lines = "\n".join(json.dumps({"text": t, "label": x}, ensure_ascii=False) for t, x in rows)
    assert texts_and_labels(written("a.jsonl", lines)) == rows
    assert read_settings(written("a.toml", "rounds = 3\n")) == {"rounds": 3}
    assert read_settings(written("a.json", '{"rounds":\n3}')) == {"rounds": 3}
    assert read_contacts(written("edges.txt", "0 1\n"), 2).tolist() == [[0, 1]]
    mixtures = written("mix.json", "[[1, 0],\n [0, 1]]")
    data = Rows((("a",), ("b",)), np.array([0, 1]))
    task = Task("two", data, data, data, ("a", "b"), "accuracy")
    assert len(deal(task, Config(clients=2, label_skew=str(mixtures)))) == 2


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.jsonl"])
def test_another_encoding_is_refused_by_line_or_named(tmp_path, name):
    separator = "\t" if name == "x.tsv" else ","
    lines = [f"text{separator}label", f"a{separator}x", f"caf\u00e9{separator}y"]
    if name == "x.jsonl":
        lines = ["", '{"text": "a", "label": "x"}', '{"text": "caf\u00e9", "label": "y"}']
    file = tmp_path / name
    file.write_bytes("\n".join(lines).encode("cp1252"))
    with pytest.raises(
        ValueError, match=rf"{name}, line 3: the byte 0xe9 .* --encoding, such as cp"
    ):
        texts_and_labels(file)
    assert texts_and_labels(file, encoding="cp1252")[1] == ("caf\u00e9", "y")
    with pytest.raises(ValueError, match="no encoding 'cp12520'"):
        texts_and_labels(file, encoding="cp12520")
    file.write_bytes("\n".join(lines).encode("utf-16-le").replace(b"\xe9", b"e"))
    with pytest.raises(ValueError, match="a zero byte, as in UTF-16 without its mark"):
        texts_and_labels(file)
    assert texts_and_labels(file, encoding="utf-16-le")[1] == ("cafe", "y")


def test_settings_in_another_encoding_name_the_line(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"rounds = 3\n# \xe9\n")
    with pytest.raises(ValueError, match=r"a.toml, line 2: the byte 0xe9 is not utf-8. Save it as"):
        read_text(tmp_path / "a.toml")


# -- GLUE archives


@pytest.mark.parametrize(
    ("task", "dev", "message"),
    [
        ("rte", b"sentence1\tsentence2\tlabel\na\tb\tmaybe\n", "line 2: the label 'maybe'"),
        ("rte", b"index\tlabel\tsentence1\tsentence2\n0\tentailment\ta\n", "line 2: .* breaks off"),
        ("rte", b"index\tsentence1\tsentence2\tlabel\n0\ta\t\xe9\tx\n", "line 2: the byte 0xe9"),
        ("stsb", b"sentence1\tsentence2\tscore\na\tb\t1.5\na\tb\tgood\n", "line 3: .*'good'"),
        ("stsb", b"sentence1\tsentence2\tscore\na\tb\tnan\n", "line 2: the label 'nan'"),
    ],
)  # fmt: skip
def test_faults_of_a_glue_archive_have_file_and_line(tmp_path, task, dev, message):
    folder = tmp_path / sources.GLUE[task].folder
    folder.mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_bytes(dev)
    with pytest.raises(ValueError, match=f"train.tsv, {message}"):
        sources.glue(task, str(tmp_path))


# -- settings


def test_dev_needs_no_keys(tmp_path):
    (tmp_path / "train.csv").write_text(
        "text,label,site\n" + "\n".join(f"t{i},{'xy'[i % 2]},s{i % 2}" for i in range(20))
    )
    (tmp_path / "dev.csv").write_text("text,label\na,x\n")
    files = {"train_file": str(tmp_path / "train.csv"), "dev_file": str(tmp_path / "dev.csv")}
    task = load_task(Config(task="file", key_column="site", **files))
    assert set(task.train.keys or ()) == {"s0", "s1"}
    assert task.test.keys is None
    with pytest.raises(ValueError, match=r"dev\.csv has no column 'site'"):
        load_task(Config(task="file", key_column="site", test_split="client", **files))
    (tmp_path / "dev.csv").write_text("text,label,site\na,x,s1\n")
    task = load_task(Config(task="file", key_column="site", test_split="client", **files))
    assert task.test.keys == ("s1",)


def test_a_wrong_column_is_said_without_torch(tmp_path):
    (tmp_path / "x.csv").write_text("text,label\na,x\n")
    code = (
        "import sys; from plait.cli.main import main;"
        f"main(['run', '--task=file', '--train-file={tmp_path}/x.csv',"
        f"'--dev-file={tmp_path}/x.csv', '--label-column=y', '--out={tmp_path}/out']);"
        "assert 'torch' not in sys.modules; assert 'pandas' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "has no column 'y'. There are: 'text', 'label'" in done.stderr
    check_files(Config(task="demo"))


def test_parquet_without_pyarrow_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="pip install pyarrow"):
        read_file(str(tmp_path / "x.parquet"), ["text"], "label")
