"""Report and dashboard in Chromium. Skipped without one; CHROMIUM names it where it isn't found."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fake_folders import NAMES, begin_run, write_comparison, write_peer
from plait.report.page import html_report
from plait.report.study import read_studies

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update"
)
SIZES = [(1440, "light"), (1440, "dark"), (390, "light"), (390, "dark")]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield started
        started.close()


@contextmanager
def opened(browser, address: str, width: int = 1440, scheme: str = "light") -> Iterator:
    """A page; fails if it complains, or asks for anything outside of its own address."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    complaints: list[str] = []
    own = re.compile(r"^(file|data|blob):|^http://127\.0\.0\.1:\d+/")
    page.on("console", lambda said: complaints.append(f"{said.type}: {said.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda one: own.match(one.url) or complaints.append(one.url))
    page.goto(address)
    yield page
    context.close()
    assert complaints == []


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "cmp"
    with pytest.MonkeyPatch.context() as patch:
        write_comparison(folder, patch)
    (folder / "report.html").write_text(html_report(read_studies([folder])))
    return folder


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_the_report_opens_without_a_complaint(browser, comparison, width, scheme):
    with opened(browser, f"file://{comparison}/report.html", width, scheme) as page:
        page.wait_for_selector("figure[data-chart=partition] .main-svg")
        drawn = page.locator("figure:not([hidden])")
        assert drawn.count() == drawn.filter(has=page.locator(".main-svg")).count() == 11
        assert page.evaluate("document.documentElement.scrollWidth") == width
        # Nor does the name of a run that differs from the others in many settings widen the page.
        page.evaluate("document.querySelector('#run').options[0].text = 'long '.repeat(200)")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 20, 23)"
        assert dark == (scheme == "dark")
        # What is drawn is said in words, and every control has a name.
        unnamed = "plot => !plot.getAttribute('aria-label')"
        assert page.evaluate(f"[...document.querySelectorAll('.plot')].some({unnamed})") is False
        unlabelled = "one => !one.labels || !one.labels.length"
        controls = "[...document.querySelectorAll('select, input')]"
        assert page.evaluate(f"{controls}.some({unlabelled})") is False


def test_a_peers_report_shows_what_it_does_not_know_without_a_complaint(browser, tmp_path):
    write_peer(tmp_path / "b" / "out", 1, 3, client_names=NAMES, peer=1)
    (tmp_path / "report.html").write_text(html_report(read_studies([tmp_path])))
    with opened(browser, f"file://{tmp_path}/report.html") as page:
        page.wait_for_selector("figure[data-chart=partition] .main-svg")
        unknown, known = page.evaluate("byId('graph').data.slice(-2).map((one) => one.hovertext)")
        assert [one.split("<br>")[0] for one in known] == ["clinic"]
        assert [one.split("<br>")[0] for one in unknown] == ["north", "lab", "south"]
        assert page.locator("#round-table tbody th").all_inner_texts() == list(NAMES)
        assert page.evaluate("byId('graph').data.at(-1).marker.color") == [0.75]
        alone = page.locator("figure[data-chart=apart]")
        assert "not known" in alone.inner_text()
        assert not alone.locator(".plot").is_visible()


def test_the_tables_numbers_are_those_of_summary_json(browser, comparison):
    summary = json.loads((comparison / "summary.json").read_text())
    with opened(browser, f"file://{comparison}/report.html") as page:
        rows = page.locator("#results tbody tr").all()
        assert len(rows) == len(summary["methods"])
        for row, one in zip(rows, summary["methods"], strict=True):
            cells = [row.locator("th").inner_text(), *row.locator("td").all_inner_texts()]
            assert cells[0] == one["label"]
            reach = one["interval"][1] - one["accuracy_client_mean"]
            assert cells[1] == f"{one['accuracy_client_mean']:.3f} ± {reach:.3f}"
            assert cells[3] == f"{one['accuracy_averaged_model']:.3f}"
        assert summary["verdict"] in page.locator(".verdict").inner_text()
        runs = page.locator("#runs tbody tr")
        assert runs.count() == sum(len(one["runs"]) for one in summary["methods"])
        shown = float(runs.nth(0).locator("td").nth(2).inner_text())
        assert shown == round(summary["methods"][0]["runs"][0]["accuracy_client_mean"], 3)


def lines_of(page) -> list:
    """x, colour and width of the lines of the topology; the last two traces are the clients."""
    lines = "byId('graph').data.slice(0, -2)"
    return page.evaluate(f"{lines}.map((one) => [one.x, one.line.color, one.line.width])")


def test_the_slider_moves_the_topology(browser, comparison):
    with opened(browser, f"file://{comparison}/report.html") as page:
        slider = page.locator("#round")
        page.wait_for_selector("#graph .main-svg")
        last = lines_of(page)
        slider.focus()
        page.keyboard.press("Home")
        assert "Round 1:" in page.locator("#said").inner_text()
        first = lines_of(page)
        page.keyboard.press("ArrowRight")
        assert "Round 2: A trains, 1 pair met" in page.locator("#said").inner_text()
        assert slider.get_attribute("aria-valuetext") == "round 2"
        assert len({str(lines_of(page)), str(first), str(last)}) > 1
        assert lines_of(page) != first
        assert "farthest from each other: clients 0 and 3." in page.locator("#said").inner_text()
        row = page.locator("#round-table tbody tr").nth(0)
        assert row.locator("td").all_inner_texts() == ["2", "0.707", "0.5", "3", "1.5"]


def test_the_slider_shows_who_disagrees_with_whom(browser, comparison):
    with opened(browser, f"file://{comparison}/report.html") as page:
        page.wait_for_selector("#between-plot .main-svg")
        levels = "byId('between-plot').data[0].z"
        last = page.evaluate(levels)
        page.locator("#round").focus()
        page.keyboard.press("Home")
        first = page.evaluate(levels)
        assert first[0][3] == first[3][0] == 1  # the farthest of the run
        assert first[0][0] is None
        assert first[0][1] < first[0][2] < first[0][3]
        assert last[0][1] == 0  # the nearest of the run
        # A line has the colour of its pair: here one of less distance in each round.
        colours = []
        for _ in range(6):
            ((_, colour, _),) = lines_of(page)
            colours.append(colour)
            page.keyboard.press("ArrowRight")
        assert len(set(colours)) > 3


def test_it_plays_by_itself(browser, comparison):
    with opened(browser, f"file://{comparison}/report.html") as page:
        page.locator("#play").click()
        page.wait_for_selector("#said:has-text('Round 3:')")
        page.locator("#play").click()
        assert page.locator("#play").get_attribute("aria-pressed") == "false"


def test_run_measure_and_numbers_can_be_chosen(browser, comparison):
    with opened(browser, f"file://{comparison}/report.html") as page:
        page.locator("#run").select_option("ffa, seed 1")
        page.locator("select[data-switch]").select_option("loss_client_mean")
        chosen = page.locator("figure[data-chart=accuracy_client_mean]")
        chosen.locator("summary").click()
        heads = chosen.locator("details thead th").all_inner_texts()
        assert heads == ["rounds done", "adf", "dec-lora", "ffa", "dec-lora (matched)"]
        assert chosen.locator("details tbody tr").count() == 7


# -- live


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[str]:
    """`plait dashboard` in a process of its own; yields the address that it prints."""
    code = "import sys; from plait.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "dashboard", str(folder), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def test_the_live_page_shows_a_new_round_within_two_seconds(browser, tmp_path):
    go_on = begin_run(tmp_path / "run")
    for _ in range(4):
        go_on()
    with serving(tmp_path) as address, opened(browser, address) as page:
        page.wait_for_selector("text=1 of 6 rounds are done")
        page.wait_for_selector("#graph .main-svg")
        for rounds in (2, 3):
            go_on()
            written = time.monotonic()
            page.wait_for_selector(f"text={rounds} of 6 rounds are done")
            page.wait_for_selector(f"#said:has-text('Round {rounds}:')")
            assert time.monotonic() - written < 2
            go_on()
        # Whoever looks at an earlier round stays there.
        page.locator("#round").focus()
        page.keyboard.press("Home")
        go_on()
        page.wait_for_selector("text=4 of 6 rounds are done")
        assert "Round 1:" in page.locator("#said").inner_text()


def test_elsewhere_the_token_opens_it(browser, tmp_path):
    begin_run(tmp_path / "run")()
    with serving(tmp_path, "--host", "0.0.0.0") as address:
        local = address.replace("0.0.0.0", "127.0.0.1")
        assert "?token=" in local
        with opened(browser, local) as page:
            page.wait_for_selector("h1")
            assert page.locator("#state").inner_text() in ("live", "connecting")
