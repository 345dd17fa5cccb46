from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fake_runs import FakeRuns, events
from plait.cli.main import main
from plait.config import Config
from plait.events import to_line
from plait.experiments import benchmark, claims
from plait.experiments import executors as workers
from plait.experiments.claims import CLAIMS, Side, judged
from plait.experiments.curves import curve_figures
from plait.experiments.plan import Plan
from plait.experiments.results import load
from plait.experiments.significance import rows_interval
from plait.figures import summarize
from plait.methods import METHODS
from plait.runs.run_folder import load_config, load_events

SEEDS = range(6)


def frame(**gaps: list[float]) -> pd.DataFrame:
    """Rows of the part `main`: ADF-LoRA at .8, each rival below it by its gaps, a seed each."""
    lines = {"adf": [0.0] * 6, **{k.replace("_", "-"): v for k, v in gaps.items()}}
    rows = [
        {
            "part": "main", "kind": "reported", "state": "finished", "label": label, "task": task,
            "seed": seed, "accuracy_client_mean": 0.8 - apart[seed], "pilot": None, "at_half": 0.7,
            "area": np.nan, "roughness": 0.1, "hits": [],
            "clients": 4, "digest": f"{label}-{task}-{seed}",
        }
        for label, apart in lines.items() for task in ("trec", "movies") for seed in SEEDS
    ]  # fmt: skip
    return pd.DataFrame(rows)


def verdicts(rows: pd.DataFrame) -> dict[str, str]:
    return {one.name: one.verdict for one in judged(rows)}


def test_each_verdict_follows_from_the_rule():
    found = verdicts(frame(
        dec_lora=[0.05, 0.06, 0.05, 0.04, 0.05, 0.05],
        ffa=[-0.05, -0.06, -0.05, -0.04, -0.05, -0.05],
        rolora=[0.001, -0.002, 0.001, 0.002, -0.001, 0.0],
        **{"dec-lora (matched)": [0.1, -0.1, 0.05, -0.07, 0.02, 0.04]},
    ))  # fmt: skip
    assert found["adf-over-dec-lora"] == "holds"
    assert found["adf-over-ffa"] == "is contradicted"
    assert found["adf-over-rolora"] == "makes no odds"
    assert found["adf-over-matched"] == "is undecided"
    assert "adf-faster" not in found  # no run was evaluated in between
    assert "tad-sparse" not in found  # that part isn't there


def test_a_finding_has_each_task_by_itself():
    rows = frame(ffa=[0.0, 0.02, 0.01, 0.0, 0.02, 0.01])
    of_trec = (rows["label"] == "ffa") & (rows["task"] == "trec")
    rows.loc[of_trec, "accuracy_client_mean"] -= 0.1
    (one,) = (o for o in judged(rows) if o.name == "adf-over-ffa")
    assert one.apart.mean == pytest.approx(0.06)
    assert one.tasks["trec"][:2] == pytest.approx((0.8, 0.69))
    assert one.tasks["trec"][2].mean == pytest.approx(0.11)
    assert one.tasks["movies"][2].mean == pytest.approx(0.01)
    assert one.means == pytest.approx((0.8, 0.74))


def test_a_claim_is_corrected_for_all_others():
    alone = frame(dec_lora=[0.05, 0.01, 0.03, 0.04, 0.0, 0.02])
    (one,) = (o for o in judged(alone) if o.name == "adf-over-dec-lora")
    expected = stats.ttest_1samp([0.05, 0.01, 0.03, 0.04, 0.0, 0.02], 0).pvalue
    assert one.apart.p == pytest.approx(expected)
    assert one.p_holm == one.apart.p
    rivals = {"ffa": [0.0, 0.01] * 3, "rolora": [0.01, 0.0] * 3}
    more = frame(dec_lora=[0.05, 0.01, 0.03, 0.04, 0.0, 0.02], **rivals)
    (one,) = (o for o in judged(more) if o.name == "adf-over-dec-lora")
    assert one.p_holm > 2 * one.apart.p
    assert one.effect == pytest.approx(0.025 / np.std([0.05, 0.01, 0.03, 0.04, 0.0, 0.02], ddof=1))


def test_only_seeds_that_both_sides_have_on_all_tasks_count():
    rows = frame(dec_lora=[0.05] * 6)
    gone = (rows["label"] == "dec-lora") & (rows["task"] == "trec") & (rows["seed"] == 3)
    found = judged(rows[~gone])
    assert {len(one.values) for one in found if one.name == "adf-over-dec-lora"} == {5}


def test_the_interval_over_rows_is_wider_where_rows_are_few():
    random = np.random.default_rng(0)
    few, many = (
        [random.choice([-1.0, 0.0, 1.0], size=(5, rows), p=[0.2, 0.5, 0.3])] for rows in (30, 3000)
    )
    wide, narrow = rows_interval(few), rows_interval(many)
    assert wide[1] - wide[0] > 4 * (narrow[1] - narrow[0])
    assert narrow[0] < many[0].mean() < narrow[1]
    assert rows_interval([np.full((3, 4), 0.25), np.full((3, 9), 0.75)]) == pytest.approx(
        (0.5, 0.5)
    )


def test_curves_are_what_they_say():
    said = list(events(Config(clients=4, rounds=4), 0.9))  # .5, then .6 .7 .8 .9
    found = curve_figures(said)
    assert found["before"] == pytest.approx(0.5)
    assert found["area"] == pytest.approx(0.7)
    assert found["at_half"] == pytest.approx(0.7)
    assert found["roughness"] == pytest.approx(0.0, abs=1e-12)


def test_every_claim_names_a_method_and_a_part_of_some_size():
    parts = {file.stem for file in claims.SUITES.glob("*/*.toml")}
    for claim in CLAIMS.values():
        assert claim.part in parts
        for side in (claim.ours, claim.theirs):
            assert side.label.removesuffix(" (matched)") in METHODS


def _plans_of(side: Side, plans: Sequence[Plan]) -> list[Plan]:
    there = [plan for plan in plans if side.label in plan.labels]
    for name, value in side.where.items():
        there = [plan for plan in there if getattr(plan.config, name) == value]
    return there


@pytest.mark.parametrize("size", benchmark.SIZES)
def test_each_size_can_test_its_claims(size, tmp_path):
    parts, tested = benchmark.parts_of(size, tmp_path), 0
    for claim in CLAIMS.values():
        if claim.part not in parts:
            continue
        plans = parts[claim.part].plans
        sides = [_plans_of(side, plans) for side in (claim.ours, claim.theirs)]
        assert size == "S" or all(sides), f"{size}: {claim}"
        tested += all(sides)
    assert tested >= 8


def benchmarked(out: Path, *more: str) -> int:
    return main(["benchmark", *more, "--size", "S", "--only", "switching", "--out", str(out),
                 "--jobs", "1"])  # fmt: skip


def test_a_benchmark_runs_and_ends_with_its_page(monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    gap = {5: 0.0, 1: 0.03}
    runs = FakeRuns(lambda c: 0.8 - gap[c.switch_every] + 0.001 * (c.seed % 3) * c.switch_every)
    monkeypatch.setattr(workers, "Run", runs)
    assert benchmarked(out) == 0
    page = (out / "benchmark.md").read_text()
    assert "| switching-5-over-1 |" in page
    assert "### switching-5-over-1: holds" in page
    assert "`rounds` 20, `task` trec, `max_length` 12, `clients` 5," in page
    assert "`topology` pairs, `p` 0.1" in page
    assert "`switch_every`" not in page.partition("## The tables")[2]  # it is the axis
    assert set(load(out)["part"]) == {"switching"}
    assert "switching-5-over-1 holds" in capsys.readouterr().out
    before = len(runs.started)
    assert benchmarked(out) == 0  # goes on: nothing is left to do
    assert len(runs.started) == before
    (out / "benchmark.md").unlink()
    assert benchmarked(out, "page") == 0
    assert (out / "benchmark.md").read_text() == page


def test_a_part_that_was_run_elsewhere_is_in_the_table_alone(monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(workers, "Run", FakeRuns(lambda c: 0.8 + 0.001 * c.seed))
    args = ["benchmark", "--size", "S", "--out", str(out), "--jobs", "1", "--only"]
    assert main([*args, "switching,density"]) == 0
    page = (out / "benchmark.md").read_text()
    shutil.rmtree(out / "density")
    assert main([*args, "switching"]) == 0
    assert (out / "benchmark.md").read_text() == page
    shutil.rmtree(out / "switching")
    assert main(["benchmark", "page", "--size", "S", "--out", str(out)]) == 0
    assert (out / "benchmark.md").read_text() == page
    shutil.rmtree(out)
    assert main(["benchmark", "page", "--size", "S", "--out", str(out)]) == 1
    assert "has no part of this benchmark" in capsys.readouterr().err


def test_a_part_that_lost_runs_counts_by_the_table(monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(workers, "Run", FakeRuns(lambda c: 0.8 + 0.001 * c.seed))
    args = ["benchmark", "--size", "S", "--out", str(out), "--jobs", "1", "--only"]
    assert main([*args, "switching,density"]) == 0
    page = (out / "benchmark.md").read_text()
    for part in ("switching", "density"):  # in whatever order they are run and verified
        assert main([*args, part]) == 0
        assert main([*args, part, "verify"]) == 0
    assert main([*args, "density,switching", "verify"]) == 0
    for run in list((out / "switching" / "runs").iterdir())[1:]:
        shutil.rmtree(run)
    assert main([*args, "switching", "page"]) == 0
    assert (out / "benchmark.md").read_text() == page
    assert main([*args, "switching", "verify"]) == 1
    assert "the run is missing" in capsys.readouterr().out
    assert main([*args, "switching"]) == 0
    assert (out / "benchmark.md").read_text() == page
    assert main([*args, "switching", "verify"]) == 0


@pytest.mark.parametrize("action", ["run", "page", "verify"])
def test_a_folder_of_another_size_is_refused(monkeypatch, tmp_path, capsys, action):
    out = tmp_path / "out"
    monkeypatch.setattr(workers, "Run", FakeRuns(lambda c: 0.8 + 0.001 * c.seed))
    assert benchmarked(out) == 0
    page = (out / "benchmark.md").read_text()
    shutil.rmtree(out / "switching")
    assert main(["benchmark", action, "--size", "M", "--out", str(out)]) == 1
    assert "results.parquet is of size S: give size M a folder" in capsys.readouterr().err
    assert (out / "benchmark.md").read_text() == page
    assert not (out / "switching").exists()
    pd.DataFrame({"part": ["main"]}).to_parquet(out / "results.parquet")
    assert benchmarked(out, action) == 1
    assert "results.parquet is no benchmark's results" in capsys.readouterr().err
    (out / "results.parquet").write_text("x")
    assert benchmarked(out, action) == 1
    assert "results.parquet can't be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "text"), [("summary.json", "[]"), ("summary.json", "{}"), ("failure.json", "[1")]
)
def test_a_search_that_was_spoilt_is_found_out(monkeypatch, tmp_path, capsys, file, text):
    out = tmp_path / "out"
    monkeypatch.setattr(workers, "Run", FakeRuns(lambda c: 0.8 + 0.001 * c.seed))
    assert benchmarked(out) == 0
    run = next((out / "switching" / "tuning").iterdir())
    (run / "summary.json").unlink()
    (run / file).write_text(text)
    assert benchmarked(out, "verify") == 1
    assert "part switching can't be read" in capsys.readouterr().out


def test_a_folder_that_was_changed_is_found_out(monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(workers, "Run", FakeRuns(lambda c: 0.8 + 0.001 * c.seed))
    assert benchmarked(out) == 0
    assert benchmarked(out, "verify") == 0
    run = next((out / "switching" / "runs").iterdir())
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"accuracy_client_mean": 0.99}))
    assert benchmarked(out, "verify") == 1
    assert "another accuracy_client_mean than its events" in capsys.readouterr().out


def test_who_verifies_may_have_glue_elsewhere(monkeypatch, tmp_path):
    out = tmp_path / "out"
    monkeypatch.setattr(workers, "Run", FakeRuns(lambda c: 0.8 + 0.001 * c.seed))
    assert benchmarked(out, "run", "--glue-dir", "/ours") == 0
    assert benchmarked(out, "verify", "--glue-dir", "/theirs") == 0
    assert benchmarked(out, "verify") == 0


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("events.jsonl", "", "its files can't be read"),
        ("events.jsonl", "{\n", "its files can't be read"),
        ("summary.json", "[]", "its files can't be read"),
        ("config.json", None, "its files can't be read"),
        ("made-by.json", "{}", "its files can't be read"),
        ("summary.json", None, "the run is missing"),
    ],
)
def test_a_file_that_was_spoilt_is_found_out(monkeypatch, tmp_path, capsys, file, text, said):
    out = tmp_path / "out"
    monkeypatch.setattr(workers, "Run", FakeRuns(lambda c: 0.8 + 0.001 * c.seed))
    assert benchmarked(out) == 0
    run = next((out / "switching" / "runs").iterdir())
    (run / file).unlink() if text is None else (run / file).write_text(text)
    assert benchmarked(out, "verify") == 1
    assert f"{run}: {said}" in capsys.readouterr().out


def test_a_run_with_fewer_rounds_or_that_is_said_to_have_diverged_is_found_out(
    monkeypatch, tmp_path, capsys
):
    out = tmp_path / "out"
    monkeypatch.setattr(workers, "Run", FakeRuns(lambda c: 0.8 + 0.001 * c.seed))
    assert benchmarked(out) == 0
    few, gone = list((out / "switching" / "runs").iterdir())[:2]
    kept = [event for event in load_events(few) if getattr(event, "round", -1) != 3]
    (few / "events.jsonl").write_text("".join(to_line(event) + "\n" for event in kept))
    (few / "summary.json").write_text(json.dumps(summarize(load_config(few), kept)))
    (gone / "summary.json").unlink()
    (gone / "failure.json").write_text(json.dumps({"reason": "diverged", "diverged": True}))
    assert benchmarked(out, "verify") == 1
    said = capsys.readouterr().out
    assert f"{few}: its events are not those of its 20 rounds" in said
    assert f"{gone}: diverged" in said


@pytest.mark.parametrize("more", [["--at-most", "9"], ["--until", "0.01", "--at-most", "0"]])
def test_a_bound_on_seeds_that_nothing_adds_is_refused(more, capsys, tmp_path):
    assert main(["benchmark", "--size", "S", "--out", str(tmp_path / "out"), *more]) == 1
    assert "at_most bounds the seeds that `until` adds" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_part_is_refused(capsys, tmp_path):
    args = ["benchmark", "--size", "S", "--only", "mian", "--out", str(tmp_path / "out")]
    assert main(args) == 1
    assert "has no part 'mian'; there are: central" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
