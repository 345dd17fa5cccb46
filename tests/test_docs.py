"""Every command and script in the documentation runs: on a tiny model here, as it stands if slow.

A page is walked from its top in an empty folder: blocks with a title are written as files, `plait`
commands and Python blocks are run in turn. A block after a comment `parsed only: why` needs what a
test hasn't got; its commands must still be ones that plait understands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import save_encoder, save_language_model
from plait.cli.arguments import defaults, parse
from plait.cli.completion import options_of
from plait.cli.main import COMMANDS, main
from plait.config import Config
from plait.data.tasks import TASKS, Rows, Task, TaskRow, load_task
from plait.model.embedded import EMBEDDED
from plait.presets import PRESETS
from test_examples import TABLES

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("**/*.md"))
PAGES = [page for page in PAGES if "design" not in page.parts]
OTHERS = {
    "pip", "python3", "source", "eval", "tensorboard", "curl", "make", "ray",
    "experiments/head_ablation.sh",
    "experiments/language.sh",
}  # fmt: skip
"""What else a reader is told to type; nothing of plait's to be tested."""
TAKES = {name: row.takes for name, row in COMMANDS.items() if row.takes}


@dataclass(frozen=True)
class Block:
    """A fenced block; one with a title is a file of that name."""

    language: str
    title: str
    text: str
    parsed_only: bool

    @property
    def commands(self) -> Iterator[list[str]]:
        """The words of each command, without settings of environment variables before it."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words:
                yield words


def blocks(page: Path) -> list[Block]:
    fence = r'(<!-- parsed only: [^\n]*-->\n)?^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$'
    text = page.read_text()
    found = re.findall(fence, text, re.DOTALL | re.MULTILINE)
    assert 2 * len(found) == len(re.findall(r"^```", text, re.MULTILINE)), "a fence is not read"
    return [Block(lang, title, _included(body), bool(mark)) for mark, lang, title, body in found]


def _included(text: str) -> str:
    """The text with `--8<--` lines replaced by what they include."""

    def read(found: re.Match[str]) -> str:
        name, _, section = found[1].partition(":")
        whole = (ROOT / name).read_text()
        if not section:
            return whole
        marks = rf"# --8<-- \[start:{section}\]\n(.*?) *# --8<-- \[end:{section}\]"
        return re.findall(marks, whole, re.DOTALL)[0]

    return re.sub(r'^--8<-- "(.*)"$', read, text, flags=re.MULTILINE)


def walk(page: Path, more: dict[str, list[str]]) -> None:
    """Do what a page says, with `more` options for some commands."""
    names: dict[str, object] = {}
    for block in blocks(page):
        if block.title:
            Path(block.title).write_text(block.text)
        elif block.language == "python":
            code = compile(block.text, str(page), "exec")
            if not block.parsed_only:
                exec(code, names)
        elif block.language == "bash":
            for words in block.commands:
                do(words, block.parsed_only, more)


def do(words: list[str], parsed_only: bool, more: dict[str, list[str]]) -> None:
    """Run or parse one command."""
    if words[0] != "plait":
        assert words[0] in OTHERS, f"{words[0]} is not a command that is known here"
        for inner in re.findall(r"\$\((plait .*?)\)", " ".join(words)):
            do(shlex.split(inner), parsed_only, more)
        return
    if ">" in words:
        words = words[: words.index(">")]
    command, *args = words[1:]
    if parsed_only and command not in ("run", "compare"):
        flags = {arg.partition("=")[0] for arg in args if arg.startswith("--")}
        assert flags <= set(options_of(TAKES[command])), " ".join(words)
        return
    if parsed_only:
        more_fields = {"methods": "adf", "lrs": ""} if command == "compare" else {}
        start = TAKES[command](**defaults(args), **more_fields)
        parse(TAKES[command], command, args, start)
        return
    assert main([command, *args, *more.get(command, [])]) == 0, " ".join(words)


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """An empty folder, tables that are put back, no request to the hub, and some GLUE rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "glue" / "SST-2"
    folder.mkdir(parents=True)
    rows = [f"a {word} film {n}\t{int(word == 'good')}" for n in range(30)
            for word in ("good", "bad")]  # fmt: skip
    for name, part in (("train", rows[:40]), ("dev", rows[40:])):
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *part]) + "\n")
    before = [(table, dict(table)) for table in TABLES.values()]
    yield
    for table, kept in before:
        table.clear()
        table.update(kept)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    models = tmp_path_factory.mktemp("models")
    save_language_model(models / "language")
    return save_encoder("mean-pooled", models / "tiny")


def few_reviews(config: Config) -> Task:
    whole = load_task(dataclasses.replace(config, task="movies"))
    return dataclasses.replace(
        whole, train=some(whole.train, 300), validation=some(whole.validation, 20),
        test=some(whole.test, 20),
    )  # fmt: skip


def some(rows: Rows, count: int) -> Rows:
    return Rows(rows.texts[:count], rows.labels[:count])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_can_be_followed(page, reader, tiny_folder, monkeypatch):
    writes = page.stem == "language-models"
    monkeypatch.setitem(EMBEDDED, "smollm2", lambda: tiny_folder.with_name("language"))
    tiny = {"rounds": 2, "local_steps": 1, "eval_rows": 8}
    tiny["backbone"] = "smollm2" if writes else str(tiny_folder)
    for name, row in PRESETS.items():
        small = row.build().to_json() | tiny
        build = lambda small=small: Config.from_json(small)  # noqa: E731
        monkeypatch.setitem(PRESETS, name, dataclasses.replace(row, build=build))
    small_task = TaskRow(few_reviews, "A few film reviews in the place of TREC")
    for name in ("demo", "trec"):
        monkeypatch.setitem(TASKS, name, small_task)
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in tiny.items()]
    flags += ["--batch-size=2", f"--max-length={200 if writes else 16}", "--device=cpu"]
    # In this process, which has read all that others would read first.
    here = "--jobs=1"
    compared = [*flags, "--seeds=0", "--clients=2", here]
    walk(page, {"run": flags, "compare": compared, "sweep": [here], "init-federation": flags})


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_can_be_followed_as_it_stands(page, reader):
    walk(page, {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_a_page_names_are_there(page):
    named = re.findall(r"`((?:tests|examples|benchmarks|experiments)/[\w/.-]+)`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_a_command_that_is_none_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```bash\nplait rnu\n```\n")
    with pytest.raises(AssertionError, match="plait rnu"):
        walk(page, {})
    page.write_text("<!-- parsed only: why -->\n```bash\nX=1 plait run --ronds 3\n```\n")
    with pytest.raises(SystemExit), contextlib.redirect_stderr(None):
        walk(page, {})
