from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from scipy import stats

from fake_runs import FakeRuns, events
from plait.config import Config
from plait.experiments import executors as workers
from plait.experiments.comparison import compare, conclude, entries, verdict
from plait.experiments.plan import Plan, tuning_seeds
from plait.experiments.significance import differences, estimate, holm, seeds_needed
from plait.report.comparison_report import curves, markdown, notes, write_report

CONFIG = Config(clients=4, rounds=3, lr=1e-3)
MATCHED = "dec-lora (matched)"
OFFSETS = {0: 0.0, 1: 0.03, 2: -0.02, 3: 0.01}


def plan_of(out: Path, **settings: object) -> Plan:
    base = {"config": CONFIG, "methods": ("adf", "dec-lora", "ffa"), "seeds": (0, 1, 2)}
    return Plan(**{**base, "out": out, **settings})


def fake(monkeypatch, score) -> FakeRuns:
    runs = FakeRuns(score)
    monkeypatch.setattr(workers, "Run", runs)
    return runs


def concluded(plan: Plan):
    for _ in compare(plan):
        pass
    return conclude(plan)


# -- statistics


def test_an_interval_agrees_with_hand_and_scipy():
    one = estimate([0.80, 0.84, 0.85])
    # s = .026458, s / sqrt(3) = .015275, t(.975, 2) = 4.302653
    assert one.mean == pytest.approx(0.83)
    assert one.low == pytest.approx(0.83 - 4.302653 * 0.0152753, abs=1e-6)
    assert one.high == pytest.approx(0.83 + 4.302653 * 0.0152753, abs=1e-6)
    assert one.p == pytest.approx(stats.ttest_1samp([0.80, 0.84, 0.85], 0).pvalue)


def test_a_paired_difference_is_scipys_paired_test():
    mine, theirs = [0.80, 0.84, 0.85, 0.79], [0.79, 0.80, 0.83, 0.78]
    (one,) = differences({"adf": mine, "ffa": theirs}, "adf")
    expected = stats.ttest_rel(mine, theirs)
    interval = expected.confidence_interval()
    assert one.estimate.p == pytest.approx(expected.pvalue)
    assert (one.estimate.low, one.estimate.high) == pytest.approx((interval.low, interval.high))
    assert one.p_holm == one.estimate.p


def test_one_seed_has_no_interval_and_equal_differences_no_test():
    one = estimate([0.8])
    assert (one.mean, one.low, one.high, one.p) == (0.8, None, None, None)
    (same,) = differences({"adf": [0.8, 0.7], "ffa": [0.7, 0.6]}, "adf")
    assert same.estimate.p is None
    assert not same.significant


def test_holm_by_hand():
    # Sorted .005 .01 .03 .04, times 4 3 2 1 = .02 .03 .06 .04, never falling: .02 .03 .06 .06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_corrects_over_the_comparisons_of_the_table():
    scores = {"adf": [0.80, 0.84, 0.85], "ffa": [0.70, 0.75, 0.74], "rolora": [0.79, 0.85, 0.83]}
    ffa, rolora = differences(scores, "adf")
    assert ffa.p_holm == pytest.approx(2 * ffa.estimate.p)
    assert rolora.p_holm == pytest.approx(max(rolora.estimate.p, ffa.p_holm))


# -- the verdict


def by_method(gaps: dict[str, tuple[float, ...]]):
    """Scores around .8 that depend on the seed, less the method's gap on that seed."""

    def score(config: Config) -> float:
        method = MATCHED if config.lr == CONFIG.lr / 2 else config.method
        return 0.8 + OFFSETS.get(config.seed, 0.0) - gaps.get(method, (0.0,) * 4)[config.seed % 4]

    return score


CLEAR = {"dec-lora": (0.1, 0.11, 0.1), "ffa": (0.2, 0.21, 0.2), MATCHED: (0.15, 0.16, 0.15)}
NOISY = {"dec-lora": (0.1, -0.1, 0.03), "ffa": (0.2, 0.21, 0.2), MATCHED: (0.15, -0.16, 0.15)}


def test_a_clear_lead_is_called_significant(monkeypatch, tmp_path):
    fake(monkeypatch, by_method(CLEAR))
    conclusion = concluded(plan_of(tmp_path / "out"))
    assert conclusion.best_rival.rival == "dec-lora"
    assert verdict(conclusion).startswith(
        "adf leads dec-lora, its best rival, by 0.103: significant over 3 paired seeds"
    )
    assert "Over the matched control: +0.153, significant." in verdict(conclusion)


def test_a_lead_within_the_noise_is_not(monkeypatch, tmp_path):
    fake(monkeypatch, by_method(NOISY))
    conclusion = concluded(plan_of(tmp_path / "out"))
    assert verdict(conclusion).startswith(
        "adf leads dec-lora, its best rival, by 0.010: not significant over 3 paired seeds"
    )
    assert "Over the matched control: +0.047, not significant." in verdict(conclusion)


def test_one_that_trails_is_said_to_trail(monkeypatch, tmp_path):
    fake(monkeypatch, by_method({"dec-lora": (-0.1, -0.11, -0.1)}))
    conclusion = concluded(plan_of(tmp_path / "out", matched_control=False))
    assert verdict(conclusion).startswith("adf trails dec-lora, its best rival, by 0.103: signif")


def test_one_seed_claims_nothing(monkeypatch, tmp_path):
    fake(monkeypatch, by_method(CLEAR))
    conclusion = concluded(plan_of(tmp_path / "out", seeds=(0,)))
    assert "one seed, so it may be chance" in verdict(conclusion)
    assert "significant" not in verdict(conclusion).replace("not significant", "")
    assert "±" not in markdown(conclusion)


def test_a_single_method_has_no_rival(monkeypatch, tmp_path):
    fake(monkeypatch, by_method(CLEAR))
    conclusion = concluded(plan_of(tmp_path / "out", methods=("ffa",)))
    assert conclusion.best_rival is None
    assert "nothing to compare" in verdict(conclusion)


# -- what runs


def test_seeds_are_paired_and_the_matched_control_runs_at_half_the_rate(monkeypatch, tmp_path):
    runs = fake(monkeypatch, by_method(CLEAR))
    plan = plan_of(tmp_path / "out", lrs={"adf": 4e-3, "ffa": 1e-2})
    concluded(plan)
    assert {(c.method, c.lr) for c in runs.started} == {
        ("adf", 4e-3), ("dec-lora", 1e-3), ("ffa", 1e-2), ("dec-lora", 2e-3),
    }  # fmt: skip
    for seed in plan.seeds:
        shared = {
            dataclasses.replace(c, method="adf", lr=1) for c in runs.started if c.seed == seed
        }
        assert len(shared) == 1
    folders = {path.name for path in plan.out.iterdir()}
    assert {"adf-seed0", "dec-lora-matched-seed2"} <= folders


def test_a_schedule_ends_in_proportion_to_each_rate(monkeypatch, tmp_path):
    runs = fake(monkeypatch, by_method(CLEAR))
    config = dataclasses.replace(CONFIG, lr_schedule="cosine", lr_end=1e-4)
    concluded(plan_of(tmp_path / "out", config=config, lr_grid=(2e-3, 4e-3), lrs={"ffa": 1e-2}))
    assert {c.eval_split for c in runs.started} == {"validation", "test"}
    assert all(c.lr_end / c.lr == pytest.approx(0.1) for c in runs.started)


def test_a_verdict_says_what_was_not_tuned(monkeypatch, tmp_path):
    fake(monkeypatch, by_method(CLEAR))
    given = plan_of(tmp_path / "given", lrs={"adf": 2e-3, "dec-lora": 1e-3, "ffa": 1e-2})
    assert "tuned" not in verdict(concluded(given))
    some = plan_of(tmp_path / "some", lrs={"adf": 2e-3})
    assert verdict(concluded(some)).endswith("No learning rate was tuned for dec-lora, ffa.")


def test_steins_interval_has_the_spread_of_the_first_seeds():
    # s = .02 of the first three; t(.975, 2) = 4.302653; five seeds.
    one = estimate([0.0, 0.04, 0.02, 0.1, -0.06], pilot=3)
    assert one.mean == pytest.approx(0.02)
    assert one.high - one.mean == pytest.approx(4.302653 * 0.02 / 5**0.5)
    assert one.p == pytest.approx(2 * stats.t.sf(0.02 / (0.02 / 5**0.5), 2))


def test_seeds_needed_give_an_interval_of_the_length_that_was_asked_for():
    scores = {"adf": [0.8, 0.8, 0.8], "ffa": [0.8, 0.76, 0.78], "local": [0.5, 0.5, 0.5]}
    n = seeds_needed(scores, "adf", 0.02, at_most=100)
    assert n == 19  # (4.302653 * .02 / .02)^2 = 18.5
    assert seeds_needed(scores, "adf", 0.02, at_most=10) == 10
    assert seeds_needed(scores, "adf", 1.0, at_most=10) == 3
    assert seeds_needed(scores, "adf", 0.02, at_most=2) == 3  # what has run has run


def test_a_comparison_adds_seeds_until_its_intervals_are_short(monkeypatch, tmp_path):
    runs = fake(monkeypatch, lambda c: 0.8 - (OFFSETS.get(c.seed, 0.0) if c.method == "ffa" else 0))
    plan = plan_of(
        tmp_path / "out", methods=("adf", "ffa"), matched_control=False, until=0.04, at_most=5,
        lrs={"adf": 1e-3, "ffa": 1e-3},
    )  # fmt: skip
    conclusion = concluded(plan)
    assert {c.seed for c in runs.started} == {0, 1, 2, 3, 4}
    (one,) = conclusion.differences
    values = [OFFSETS.get(seed, 0.0) for seed in range(5)]
    assert one.estimate.low == pytest.approx(estimate(values, pilot=3).low)
    assert "seeds 0, 1, 2, 3, 4, paired" in " ".join(notes(conclusion))


def test_a_control_that_is_dec_lora_itself_runs_once(monkeypatch, tmp_path):
    fake(monkeypatch, by_method(CLEAR))
    plan = plan_of(tmp_path / "out", lrs={"adf": 2e-3})
    assert [entry.label for entry in entries(plan)] == ["adf", "dec-lora", "ffa"]
    said = "adf's matched control, dec-lora at 0.5 times its rate, is a line already."
    assert said in notes(concluded(plan))


def test_a_search_takes_the_best_rate_on_the_validation_split(monkeypatch, tmp_path):
    runs = fake(monkeypatch, lambda config: 0.8 - abs(config.lr - 2e-3) * 10)
    plan = plan_of(tmp_path / "out", lr_grid=(5e-4, 1e-3, 2e-3, 5e-3), lrs={"ffa": 1e-2})
    concluded(plan)
    tuned = [config for config in runs.started if config.eval_split == "validation"]
    assert len(tuned) == 16
    assert {config.seed for config in tuned} == set(tuning_seeds(plan.seeds))
    assert not {config.seed for config in tuned} & set(plan.seeds)
    assert [(e.label, e.lr) for e in entries(plan)] == [
        ("adf", 2e-3), ("dec-lora", 2e-3), ("ffa", 1e-2), (MATCHED, 1e-3),
    ]  # fmt: skip
    assert sum(plan.planned.values()) == len(runs.started)


def test_a_search_goes_beyond_its_grid_while_the_best_rate_is_its_edge(monkeypatch, tmp_path):
    runs = fake(monkeypatch, lambda config: 0.8 - abs(config.lr - 7e-3))
    conclusion = concluded(plan_of(tmp_path / "out", lr_grid=(1e-3, 2e-3), lrs={"ffa": 1e-2}))
    tuned = {c.lr for c in runs.started if c.eval_split == "validation"}
    assert tuned == {1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2}
    assert conclusion.outcomes[0].entry.lr == 8e-3
    assert "†" not in markdown(conclusion)


def test_a_rate_at_the_edge_of_the_grid_is_marked(monkeypatch, tmp_path):
    fake(monkeypatch, lambda config: 0.5 + config.lr)
    conclusion = concluded(plan_of(tmp_path / "out", lr_grid=(1e-3, 2e-3)))
    assert "0.016†" in markdown(conclusion)  # three rates beyond the grid are enough
    assert "beyond it may be better" in markdown(conclusion)


def diverging(above: float):
    def run(config: Config, out: Path, resume: bool = False, **_machine):
        yield next(events(config, 0.8))
        if config.lr > above:
            raise ValueError("The loss of client 0 is not finite in round 0.")
        yield from list(FakeRuns(lambda _: 0.8)(config, out, resume))[1:]

    return run


def test_a_rate_that_diverges_loses_the_search(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "Run", diverging(1e-3))
    plan = plan_of(tmp_path / "out", lr_grid=(1e-3, 5e-3))
    assert [e.lr for e in (concluded(plan).outcomes[0].entry,)] == [1e-3]


def test_a_rate_that_diverged_is_not_tried_again(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "Run", diverging(1e-3))
    plan = plan_of(tmp_path / "out", methods=("ffa",), lr_grid=(1e-3, 5e-3))
    first = concluded(plan)
    runs = fake(monkeypatch, lambda _: 0.8)
    again = concluded(dataclasses.replace(plan, resume=True))
    assert again.outcomes[0].entry == first.outcomes[0].entry
    assert {c.lr for c in runs.started if c.eval_split == "validation"} <= {1e-3, 2e-4}


def test_a_search_in_which_all_diverge_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "Run", diverging(0))
    with pytest.raises(ValueError, match="adf diverged at every rate"):
        concluded(plan_of(tmp_path / "out", lr_grid=(1e-3,)))


def test_a_reported_run_that_diverges_says_which(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "Run", diverging(0))
    with pytest.raises(ValueError, match="adf, seed 0: The loss"):
        concluded(plan_of(tmp_path / "out"))


def test_resume_runs_only_what_is_missing(monkeypatch, tmp_path):
    runs = fake(monkeypatch, by_method(CLEAR))
    plan = plan_of(tmp_path / "out", matched_control=False)
    first = concluded(plan)
    with pytest.raises(ValueError, match="--resume"):
        next(compare(plan))
    runs.started.clear()
    again = concluded(dataclasses.replace(plan, resume=True))
    assert runs.started == []
    assert markdown(again) == markdown(first)
    more = dataclasses.replace(plan, resume=True, seeds=(0, 1, 2, 3))
    runs.score = by_method({})
    concluded(more)
    assert {config.seed for config in runs.started} == {3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ("adf", "fffa")}, "Unknown method 'fffa'. Did you mean ffa"),
        ({"methods": ("adf", "adf")}, "give each once"),
        ({"methods": ()}, "at least one"),
        ({"seeds": ()}, "at least one"),
        ({"lrs": {"rolora": 1e-3}}, "rolora, which isn't compared"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        plan_of(tmp_path, **settings)


# -- what is written


def test_the_report_has_table_picture_and_figures(monkeypatch, tmp_path):
    fake(monkeypatch, by_method(CLEAR))
    conclusion = concluded(plan_of(tmp_path / "out"))
    write_report(conclusion)
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["best_rival"] == "dec-lora"
    assert [one["label"] for one in summary["methods"]] == ["adf", "dec-lora", "ffa", MATCHED]
    assert len(summary["methods"][0]["runs"]) == 3
    assert summary["differences"][0]["difference"] == pytest.approx(0.31 / 3)
    assert summary["differences"][0]["significant"]
    assert summary["verdict"] == verdict(conclusion)
    table = (out / "table.md").read_text().splitlines()
    assert len({line.count("|") for line in table[:6]}) == 1
    assert table[2].startswith("| adf | 0.803 ± ")
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob("*.partial"))


def test_the_picture_needs_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'plait\[report\]'"):
        curves({"adf": [list(events(CONFIG, 0.8))]}, tmp_path / "curves.png")
