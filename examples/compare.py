"""A comparison from Python: two methods on paired seeds, and the verdict."""

import dataclasses
import tempfile
from pathlib import Path

import plait
from plait.experiments.comparison import verdict
from plait.report.comparison_report import markdown

with tempfile.TemporaryDirectory() as folder:
    # --8<-- [start:compare]
    plan = plait.Plan(
        config=dataclasses.replace(plait.build_preset("smoke"), rounds=1),
        methods=("adf", "ffa"),
        seeds=(0, 1),
        out=Path(folder) / "comparison",
    )
    for cell, event in plait.compare(plan):
        print(cell.label, cell.config.seed, type(event).__name__)
    conclusion = plait.conclude(plan)
    print(markdown(conclusion))
    print(verdict(conclusion))
    # --8<-- [end:compare]
