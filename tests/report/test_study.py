"""Which runs are shown together: each once, and none beside a run of other settings."""

from __future__ import annotations

import dataclasses
import json
import shutil

from fake_folders import CONFIG, write_peer, write_run
from plait.report.page import html_report
from plait.report.study import find_studies, read_studies, settings


def counted(*paths) -> dict[str, list[int]]:
    """Label -> the seeds of its runs, of the only study."""
    (study,) = read_studies(list(paths))
    return {label: [run.config.seed for run in runs] for label, runs in study.groups.items()}


def test_a_folder_given_twice_or_by_another_name_counts_once(tmp_path):
    run = write_run(tmp_path / "run")
    (tmp_path / "link").symlink_to(run)
    assert counted(run, run, tmp_path / "link") == {"adf": [0]}
    (study,) = read_studies([run, tmp_path / "link"])
    assert study.remarks == (f"{run} was given 2 times, by whatever name; it counts once.",)
    assert "it counts once" in html_report([study])


def test_a_copy_and_a_second_run_of_the_same_seed_count_once(tmp_path):
    run = write_run(tmp_path / "a")
    shutil.copytree(run, tmp_path / "b")
    (tmp_path / "b" / "summary.json").unlink()
    write_run(tmp_path / "c", dataclasses.replace(CONFIG, seed=1))
    (study,) = read_studies([tmp_path])
    assert [track.path.name for _, track in study.tracks] == ["a", "c"]
    assert "the same settings and seed (0)" in study.remarks[0]


def test_the_copy_of_a_federation_and_a_peer_given_beside_it_count_once(tmp_path):
    for client in range(4):
        write_peer(tmp_path / "fed" / f"p{client}" / "out", client, CONFIG.rounds)
    shutil.copytree(tmp_path / "fed", tmp_path / "copy")
    (study,) = read_studies([tmp_path / "fed", tmp_path / "copy", tmp_path / "fed" / "p1" / "out"])
    assert [label for label, _ in study.tracks] == ["adf"]
    assert study.tracks[0][1].scored[-1] == [0, 1, 2, 3]
    assert any("the same settings and seed (0)" in remark for remark in study.remarks)


def test_runs_of_a_comparison_count_in_it_alone(tmp_path, monkeypatch):
    from fake_folders import write_comparison

    plan = write_comparison(tmp_path / "cmp", monkeypatch)
    (study,) = read_studies([plan.out, plan.out / "adf-seed0"])
    assert study.plan is not None


def test_runs_that_read_other_rows_are_not_pooled(tmp_path):
    for seed, rows in enumerate(("one", "two", "one")):
        run = write_run(tmp_path / f"{seed}", dataclasses.replace(CONFIG, seed=seed))
        read = {"training rows": rows, "clients' shares": str(seed)}
        (run / "fingerprints.json").write_text(json.dumps(read))
    write_run(tmp_path / "older", dataclasses.replace(CONFIG, seed=3))
    assert counted(tmp_path) == {"adf, data 1": [0, 2, 3], "adf, data 2": [1]}


def test_every_setting_keeps_runs_apart(tmp_path):
    for number, other in enumerate((None, 5, 7)):
        changed = dataclasses.replace(CONFIG, eval_rows=other, seed=number)
        write_run(tmp_path / f"{number}", changed)
    assert counted(tmp_path) == {f"adf, eval rows {n}": [k] for k, n in enumerate((None, 5, 7))}
    (study,) = read_studies([tmp_path])
    assert ("eval_rows", "None, 5, 7", True) in settings(*study.configs)


def test_a_label_says_what_differs_from_most_of_the_runs_alone(tmp_path):
    others = [{}, {"method": "ffa"}, {"lr": 0.1, "clip_norm": None}, {"method": "dec-lora"}]
    for number, other in enumerate(others):
        write_run(tmp_path / f"{number}", dataclasses.replace(CONFIG, **other))
    assert list(counted(tmp_path)) == ["adf", "ffa", "adf, lr 0.1, clip norm None", "dec-lora"]


def test_a_finished_run_with_a_damaged_file_is_left_out_and_named(tmp_path):
    whole, cut, bad = (write_run(tmp_path / name) for name in ("whole", "cut", "bad"))
    events = cut / "events.jsonl"
    events.write_bytes(events.read_bytes()[:-9])
    (bad / "summary.json").write_text("{")
    (study,) = read_studies([whole, cut, bad])
    assert [track.path for _, track in study.tracks] == [whole]
    assert any(f"{events} is damaged" in line for line in study.remarks)
    assert any(f"{bad / 'summary.json'} is damaged" in line for line in study.remarks)


def test_a_folder_that_has_another_run_by_now_is_read_anew(tmp_path):
    run, known = write_run(tmp_path / "run"), {}
    find_studies([run], known)
    shutil.rmtree(run)
    write_run(run, dataclasses.replace(CONFIG, rounds=8))
    (study,) = find_studies([run], known)
    assert study.config.rounds == 8
