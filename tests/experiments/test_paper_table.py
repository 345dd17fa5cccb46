"""`plait table`: figures against SciPy and statsmodels, on rows whose truth is known."""

from __future__ import annotations

import csv
import io
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from plait.cli.main import main
from plait.config import Config
from plait.experiments.paper_table import CSV_HEAD, FORMATS, blocks
from plait.experiments.results import save
from plait.experiments.significance import stands_out

SEEDS = range(5)
GAPS = {"adf": (0.0, 0.0), "dec-lora": (0.004, 0.0001), "ffa": (0.05, 0.06), "rolora": (0.2, 0.1)}
"""What the lines lack behind ADF, on trec and on movies."""
RNG = np.random.default_rng(7)
NOISE = {
    (method, task): RNG.normal(0, 0.003 if task == "trec" else 0.02, len(SEEDS))
    for method in GAPS
    for task in ("trec", "movies")
}
OF_SEED = {"trec": [0.0, 0.08, -0.05, 0.02, 0.04], "movies": [0.01, 0.0, -0.06, 0.03, 0.07]}


def truth(method: str, task: str) -> np.ndarray:
    """(5,) scores: what is common to a seed, less the method's gap, and noise of its own."""
    gap = GAPS[method][("trec", "movies").index(task)]
    return 0.8 + np.array(OF_SEED[task]) - gap + NOISE[method, task]


def row(label: str, task: str, seed: int, score: float | None, **settings: object) -> dict:
    config = Config(task=task, seed=seed, method=label.split()[0])
    return {
        "kind": "reported",
        "label": label,
        "digest": f"{label} {task} {seed} {settings.get('p')}",
        "state": "finished" if score is not None else "failed",
        **config.to_json(),
        **settings,
        "accuracy_client_mean": score,
    }


def store(**settings: object) -> pd.DataFrame:
    """Four methods, two tasks, five seeds."""
    return pd.DataFrame([
        row(method, task, seed, truth(method, task)[seed], **settings)
        for task in ("trec", "movies")
        for seed in SEEDS
        for method in GAPS
    ])  # fmt: skip


def figures(frame: pd.DataFrame, **how: str) -> dict[tuple[str, str], dict[str, str]]:
    lines = csv.DictReader(io.StringIO(FORMATS["csv"](blocks(frame, **how))))
    assert tuple(lines.fieldnames or ()) == CSV_HEAD
    return {(line["column"], line["line"]): line for line in lines}


def scores(task: str) -> dict[str, np.ndarray]:
    if task == "mean":
        return {m: (truth(m, "trec") + truth(m, "movies")) / 2 for m in GAPS}
    return {method: truth(method, task) for method in GAPS}


@pytest.mark.parametrize("column", ["trec", "movies", "mean"])
def test_the_figures_are_those_of_scipy_and_statsmodels(column):
    found, true = figures(store()), scores(column)
    for method, values in true.items():
        low, high = stats.t.interval(0.95, 4, values.mean(), stats.sem(values))
        mine = found[column, method]
        assert [float(mine[k]) for k in ("mean", "low", "high")] == pytest.approx(
            [values.mean(), low, high], abs=1e-12
        )
        assert int(mine["seeds"]) == 5
    rivals = [method for method in GAPS if method != "adf"]
    tests = [stats.ttest_rel(true["adf"], true[rival]) for rival in rivals]
    reject, adjusted, _, _ = multipletests([t.pvalue for t in tests], alpha=0.05, method="holm")
    for rival, test, p_holm, significant in zip(rivals, tests, adjusted, reject, strict=True):
        mine, interval = found[column, rival], test.confidence_interval(0.95)
        assert mine["reference"] == "adf"
        expected = [(true["adf"] - true[rival]).mean(), interval.low, interval.high]
        expected += [test.pvalue, p_holm]
        keys = ("difference", "difference_low", "difference_high", "p", "p_holm")
        assert [float(mine[key]) for key in keys] == pytest.approx(expected, abs=1e-12)
        assert mine["significant"] == str(bool(significant))


@pytest.mark.parametrize("column", ["trec", "movies", "mean"])
def test_only_a_line_that_beats_every_other_is_best(column):
    true = scores(column)
    pairs = list(combinations(true, 2))
    p = [stats.ttest_rel(true[a], true[b]).pvalue for a, b in pairs]
    reject = multipletests(p, alpha=0.05, method="holm")[0]
    top = max(true, key=lambda method: true[method].mean())
    beats_all = all(r for r, pair in zip(reject, pairs, strict=True) if top in pair)
    found = {line: one["best"] for (of, line), one in figures(store()).items() if of == column}
    assert [line for line, best in found.items() if best == "True"] == [top] * beats_all


def test_the_lead_is_bold_when_it_is_clear_and_not_when_it_is_close():
    close = {"a": [0.80, 0.84, 0.85], "b": [0.79, 0.85, 0.83], "c": [0.70, 0.745, 0.75]}
    assert stands_out(close) is None
    clear = {k: [0.8 - gap, 0.84 - gap, 0.85 - gap - e] for k, gap, e in
             (("a", 0, 0), ("b", 0.1, 0.0001), ("c", 0.2, 0.0003))}  # fmt: skip
    assert stands_out(clear) == "a"
    # One pair too many without a significant difference: two lines that are the same to the last
    # bit can't be told apart, so neither is best.
    assert stands_out({**clear, "d": clear["a"]}) is None
    assert stands_out({"a": [0.9, 0.8, 0.7]}) is None
    assert stands_out({"a": [0.9], "b": [0.1]}) is None


def test_correction_is_for_all_pairs_since_the_best_is_known_only_afterwards():
    # The leader beats each rival at p = .02 and .02: significant alone, for two rivals (.04), and
    # not for the three pairs there are, of which the third is not small.
    lead = np.array([0.1, 0.12, 0.07, 0.14, 0.05])
    base = np.array([0.7, 0.75, 0.8, 0.72, 0.78])
    rival = base + np.array([0.0, 0.002, -0.001, 0.001, -0.0015])

    def p(scale: float) -> float:
        return float(stats.ttest_rel(base + lead * scale - 0.076 * (scale - 1), base).pvalue)

    scale = next(s for s in np.linspace(1, 6, 400) if 0.019 < p(s) < 0.0245)
    top = base + lead * scale - 0.076 * (scale - 1)
    two = [stats.ttest_rel(top, other).pvalue for other in (base, rival)]
    assert max(two) * 2 < 0.05 < max(two) * 3
    assert stands_out({"top": top.tolist(), "base": base.tolist(), "rival": rival.tolist()}) is None


def test_the_formats(tmp_path, capsys):
    frame = store()
    save(frame, tmp_path)
    assert main(["table", str(tmp_path), "--format", "markdown"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("|  | trec | movies | mean |\n| --- | ---: | ---: | ---: |\n| adf | ")
    ffa = truth("adf", "trec") - truth("ffa", "trec")
    reach = stats.t.ppf(0.975, 4) * stats.sem(ffa)
    assert f"| adf - ffa | {ffa.mean():+.3f} ± {reach:.3f} * |" in said
    assert main(["table", str(tmp_path), "--format", "latex"]) == 0
    said = capsys.readouterr().out
    assert said.count(r"\begin{tabular}{lrrr}") == 2
    assert rf"{ffa.mean():+.3f} $\pm$ {reach:.3f}$^*$" in said
    assert "±" not in said.partition("% Mean")[0]
    assert main(["table", str(tmp_path), "--reference", "rolora"]) == 0
    said = capsys.readouterr().out
    assert "rolora - adf" in said
    first, second = said.splitlines()[:2]
    assert len(first) == len(second)
    assert main(["table", str(tmp_path), "--reference", "roloar"]) == 1
    assert "there are: adf, dec-lora, ffa, rolora" in capsys.readouterr().err


def test_a_line_that_stands_out_is_bold():
    frame = store()
    lost = frame["label"] != "adf"
    frame.loc[lost, "accuracy_client_mean"] -= 0.3
    found = {f: FORMATS[f](blocks(frame)) for f in ("text", "markdown", "latex")}
    mean = truth("adf", "trec").mean()
    assert f"**{mean:.3f} ± " in found["text"]
    assert f"| **{mean:.3f} ± " in found["markdown"]
    assert rf"\textbf{{{mean:.3f} $\pm$ " in found["latex"]
    assert found["markdown"].count("**") == 2 * 3


def test_a_line_is_named_by_its_interval_where_its_runs_depend_on_it():
    rows = []
    for T in (5, 1):
        for seed in SEEDS:
            adf = row("adf", "trec", seed, 0.8 + T / 100 + seed / 50, switch_every=T, p=0.1)
            rows.append({**adf, "digest": f"adf {T} {seed}"})
            rows.append(row("ffa", "trec", seed, 0.7 + seed / 40, switch_every=T, p=0.1))
    (block,) = blocks(pd.DataFrame(rows))
    assert block.lines == ["adf T=5", "ffa", "adf T=1"]
    assert block.columns[0].reference == "adf T=5"
    assert block.columns[0].differences["adf T=1"].estimate.mean == pytest.approx(0.04)


def test_other_axes_make_blocks_in_the_order_of_the_file():
    frame = pd.concat([store(p=0.5), store(p=0.02)], ignore_index=True)
    found = blocks(frame)
    assert [block.title for block in found] == ["p 0.5", "p 0.02"]
    assert [column.name for column in found[0].columns] == ["trec", "movies", "mean"]
    assert "There are 6 columns" in FORMATS["text"](found)


def test_runs_that_are_missing_are_left_out_of_pairs_and_said():
    frame = store()
    lost = (frame["label"] == "ffa") & (frame["task"] == "trec") & (frame["seed"] == 2)
    frame.loc[lost, ["state", "accuracy_client_mean"]] = ["failed", None]
    found = figures(frame)
    there = [0, 1, 3, 4]
    test = stats.ttest_rel(truth("adf", "trec")[there], truth("rolora", "trec")[there])
    assert float(found["trec", "rolora"]["p"]) == pytest.approx(test.pvalue)
    assert found["trec", "ffa"]["seeds"] == found["mean", "ffa"]["seeds"] == "4"
    assert found["trec", "rolora"]["seeds"] == "5"
    text = FORMATS["text"](blocks(frame))
    assert "Runs are missing" in text
    assert "Mean over 4 to 5 seeds" in text
    frame.loc[frame["label"] == "ffa", "state"] = "failed"
    text = FORMATS["text"](blocks(frame))
    line = next(line for line in text.splitlines() if line.startswith("ffa"))
    assert line.split() == ["ffa", "-", "-", "-"]
    assert "adf - rolora" in text


def test_a_rate_at_the_edge_of_its_search_is_marked():
    tuning = [
        {**row(method, "trec", 1000, 0.5), "kind": "tuning", "lr": lr}
        for method in GAPS for lr in (1e-4, 1e-3, 1e-2)
    ]  # fmt: skip
    reported = store().assign(lr=1e-3)
    reported.loc[reported["label"] == "ffa", "lr"] = 1e-2
    control = reported[reported["label"] == "dec-lora"].assign(label="dec-lora (matched)", lr=1e-4)
    frame = pd.concat([pd.DataFrame(tuning), reported, control], ignore_index=True)
    (block,) = blocks(frame)
    assert [(c.name, set(c.at_edge)) for c in block.columns] == [
        ("trec", {"ffa"}), ("movies", set()), ("mean", set())
    ]  # fmt: skip
    assert FORMATS["text"]([block]).count("†") == 2  # the cell, and what it means
    assert r"$^\dagger$" in FORMATS["latex"]([block])


def test_one_line_has_no_differences_and_one_column_nothing_beside_it():
    frame = store()
    alone = frame[(frame["label"] == "adf") & (frame["task"] == "trec")]
    text = FORMATS["markdown"](blocks(alone))
    assert text.count("| --- |") == 1
    assert "significant" not in text
    assert "columns" not in text
    assert "There are 3 columns" in FORMATS["markdown"](blocks(frame))


def test_nothing_reported_yet_is_said():
    frame = store().assign(kind="tuning")
    with pytest.raises(ValueError, match="no reported runs yet"):
        blocks(frame)
