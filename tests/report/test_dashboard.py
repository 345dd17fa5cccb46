"""The dashboard without a browser: what it reads, whom it lets in, what it says."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys

import httpx
import pytest

from fake_folders import CONFIG, begin_run, write_comparison, write_run
from plait.report import dashboard
from plait.report.dashboard import Follower, application, serve


def asked(app, path: str, base: str = "http://127.0.0.1", **options) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=base, **options) as client:
            return await client.get(path)

    return asyncio.run(ask())


def test_it_follows_what_is_not_there_yet(tmp_path):
    follower = Follower([tmp_path / "later"])
    follower.look()
    assert follower.studies == {}
    go_on = begin_run(tmp_path / "later" / "run")
    go_on()
    follower.look()
    assert follower.version == {"run": 1}
    follower.look()
    assert follower.version == {"run": 1}
    go_on(), go_on()
    follower.look()
    assert follower.version == {"run": 2}
    assert "1 of 6 rounds" in json.loads(follower.payload("run"))["pieces"]["head"]
    assert follower.payload("run") is follower.payload("run")


@pytest.mark.parametrize("file", ["config.json", "events.jsonl"])
def test_what_a_later_plait_adds_keeps_nothing_else_from_being_shown(tmp_path, file):
    go_on = begin_run(tmp_path / "run")
    go_on()
    other = write_run(tmp_path / "other", dataclasses.replace(CONFIG, task="trec")) / file
    other.write_text(other.read_text().replace("{", '{"unheard_of": 1, ', 1))
    follower = Follower([tmp_path])
    follower.look()
    go_on(), go_on()
    follower.look()
    assert follower.version["run"] == 2
    assert ("other" in follower.studies) == (file == "events.jsonl")
    shown = json.loads(follower.payload("run"))
    assert "1 of 6 rounds" in shown["pieces"]["head"]
    assert ("unheard_of" in json.dumps(shown)) == (file == "config.json"), "it is said"


def test_a_line_that_cant_be_read_is_left_out_and_said(tmp_path):
    other = write_run(tmp_path / "run") / "events.jsonl"
    with other.open("a") as file:
        file.write('{"event": "RoundDone", "round": 3}\n\0\0\0\n[1]\n')
    follower = Follower([tmp_path])
    follower.look()
    assert "3 of the lines" in follower.payload("run")


def test_a_look_that_fails_is_not_the_last_one(tmp_path, monkeypatch, caplog):
    looks = []
    follower = Follower([tmp_path])
    monkeypatch.setattr(dashboard, "LOOK_EVERY_S", 0.001)
    monkeypatch.setattr(Follower, "look", lambda _: looks.append(1) or 1 / 0)

    async def follow() -> None:
        task = asyncio.create_task(dashboard._follow(follower))
        while len(looks) < 3:
            await asyncio.sleep(0.001)
        task.cancel()

    asyncio.run(follow())
    assert len(caplog.records) == 1


def test_a_comparison_in_progress_shows_its_plan(tmp_path, monkeypatch):
    plan = write_comparison(tmp_path / "cmp", monkeypatch)
    (tmp_path / "cmp" / "ffa-seed2" / "summary.json").unlink()
    follower = Follower([tmp_path])
    follower.look()
    (study,) = follower.studies.values()
    assert not study.finished
    assert study.plan == plan
    made = json.loads(follower.payload("cmp"))
    assert "72 of 72 rounds" in made["pieces"]["head"]
    assert made["pieces"]["results"].count("<tr>") == 4


def test_it_opens_on_what_runs(tmp_path):
    write_run(tmp_path / "a" / "done")
    begin_run(tmp_path / "b" / "now", dataclasses.replace(CONFIG, task="trec"))()
    write_run(tmp_path / "c" / "later", dataclasses.replace(CONFIG, task="movies"))
    follower = Follower([tmp_path])
    assert follower.newest == ""
    follower.look()
    assert follower.newest == "now"
    said = asyncio.run(anext_study(follower))
    assert json.loads(said)["title"] == "now"
    assert [run["finished"] for run in json.loads(follower.payload("done"))["runs"]] == [True]
    (tmp_path / "b" / "now" / "summary.json").write_text("{}")
    os.utime(tmp_path / "c" / "later" / "events.jsonl", (2e9, 2e9))
    follower.look()
    assert follower.newest == "later"


async def anext_study(follower: Follower) -> str:
    """The data of the first study that a browser is told."""

    class Browser:
        async def is_disconnected(self) -> bool:
            return False

    async for event in dashboard._stream(follower, "", Browser()):
        if event.startswith("event: study\n"):
            return event.split("data: ")[1]
    raise AssertionError("no study")


def test_studies_of_the_same_name_are_told_apart(tmp_path):
    for place, task in (("a", "demo"), ("b", "trec")):
        write_run(tmp_path / place / "run", dataclasses.replace(CONFIG, task=task))
    follower = Follower([tmp_path])
    follower.look()
    assert list(follower.studies) == ["run", "run (2)"]


def test_the_page_loads_nothing_from_elsewhere(tmp_path):
    app = application(Follower([tmp_path]))
    page = asked(app, "/")
    assert page.status_code == 200
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    assert asked(app, "/plotly.js").text.startswith("/**\n* plotly.js")


def test_another_name_for_this_machine_is_refused(tmp_path):
    app = application(Follower([tmp_path]))
    assert asked(app, "/", base="http://elsewhere.example").status_code == 400


@pytest.mark.parametrize("path", ["/", "/plotly.js", "/events"])
def test_without_the_token_nothing_is_served(tmp_path, path):
    app = application(Follower([tmp_path]), token="secret")
    assert asked(app, path).status_code == 403
    assert asked(app, f"{path}?token=secreT").status_code == 403
    assert asked(app, path, cookies={dashboard.COOKIE: "other"}).status_code == 403


def test_the_token_is_kept_in_a_cookie(tmp_path):
    app = application(Follower([tmp_path]), token="secret")
    first = asked(app, "/?token=secret")
    assert first.status_code == 200
    assert "httponly" in first.headers["set-cookie"].lower()
    assert asked(app, "/plotly.js", cookies={dashboard.COOKIE: "secret"}).status_code == 200


class Gone:
    """A request whose browser leaves after a while."""

    def __init__(self, after: int) -> None:
        self.left = after

    async def is_disconnected(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_the_stream_says_what_changed_and_ends_with_its_browser(tmp_path, monkeypatch):
    monkeypatch.setattr(dashboard, "LOOK_EVERY_S", 0.0)
    go_on = begin_run(tmp_path / "run")
    go_on(), go_on()
    follower = Follower([tmp_path])
    follower.look()

    async def said() -> list[str]:
        found = []
        async for message in dashboard._stream(follower, "no such", Gone(4)):
            found.append(message.partition("\n")[0])
            if len(found) == 2:
                go_on()
                follower.look()
        return found

    assert asyncio.run(said()) == ["event: studies", "event: study", "event: study"]


def test_a_quiet_stream_pings(tmp_path, monkeypatch):
    monkeypatch.setattr(dashboard, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(dashboard, "PING_S", -1.0)

    async def said() -> list[str]:
        return [message async for message in dashboard._stream(Follower([]), "", Gone(1))]

    assert asyncio.run(said()) == [": still here\n\n"]


@pytest.mark.parametrize("missing", ["uvicorn", "starlette.applications"])
def test_it_says_what_to_install(monkeypatch, tmp_path, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=r"pip install 'plait\[report\]'"):
        serve([tmp_path], port=0)
