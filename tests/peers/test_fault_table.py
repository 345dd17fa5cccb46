"""The table of faults in docs/deploy.md has every test of the fault suite, and every case of it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [line for line in (ROOT / "docs" / "deploy.md").read_text().splitlines() if "`test_" in line]


@pytest.fixture
def suite(monkeypatch):
    """Name -> the cases of each test in tests/faults."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "faults"))
    import test_faults
    import test_outgoing_only
    import test_three_machines

    return {
        name: [str(case) for mark in getattr(test, "pytestmark", ())
               if mark.name == "parametrize" for case in mark.args[1]]
        for module in (test_faults, test_outgoing_only, test_three_machines)
        for name, test in vars(module).items() if name.startswith("test_")
    }  # fmt: skip


def test_every_test_has_a_line_and_every_line_a_test(suite):
    named = [re.findall(r"`(test_\w+)`", row)[0] for row in ROWS]
    assert sorted(named) == sorted(suite)
    for path in (ROOT / "tests" / "faults").glob("test_*.py"):
        functions = [node.name for node in ast.parse(path.read_text()).body
                     if isinstance(node, ast.FunctionDef)]  # fmt: skip
        assert {name for name in functions if name.startswith("test_")} <= suite.keys(), path


def test_a_line_has_every_case_of_its_test(suite):
    for row in ROWS:
        name = re.findall(r"`(test_\w+)`", row)[0]
        assert not [case for case in suite[name] if case not in row], row
