"""What a report is about: the runs found in folders, put into groups that can be compared.

A comparison's folder is one study, its groups are the lines of its table. Run folders that belong
to no comparison make one study for each task; there a group is the runs that differ in their seed
alone, and its label says what sets it apart from the other groups.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from plait.config import Config
from plait.experiments.comparison import (
    Conclusion,
    Outcome,
    conclude,
    entries,
    search_cells,
    seeds_of,
)  # fmt: skip
from plait.experiments.plan import PLAN, Entry, Plan, load_plan, run_folder
from plait.experiments.significance import Difference, differences
from plait.peers.federation import in_common
from plait.report.recorded_run import JoinedPeers, Track
from plait.report.series import Said
from plait.runs.listing import check_events

Read = TypeVar("Read")

DEEPEST = 4
"""How far below a given folder runs are looked for."""


@dataclass(frozen=True)
class Study:
    """Runs that are shown together.

    Attributes:
        title: A name for people.
        groups: Label -> its runs, a seed each; the first label is compared with the others.
        plan: Of a comparison.
        remarks: What was left out, so that no run counts twice, a sentence each.
    """

    title: str
    groups: dict[str, list[Track]]
    plan: Plan | None = None
    remarks: tuple[str, ...] = ()

    @property
    def tracks(self) -> list[tuple[str, Track]]:
        """Every run with its label."""
        return [(label, track) for label, tracks in self.groups.items() for track in tracks]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of its runs."""
        return tuple(sorted({track.config.seed for _, track in self.tracks}))

    @property
    def said(self) -> dict[str, Said]:
        """Label -> the events of each of its runs."""
        return {label: [run.events for run in runs] for label, runs in self.groups.items()}

    @property
    def config(self) -> Config:
        """The settings that its runs share, and the first one's where they differ."""
        return self.plan.config if self.plan else self.tracks[0][1].config

    @property
    def configs(self) -> list[Config]:
        """The settings of its runs, each once."""
        each = (track.configs for _, track in self.tracks)
        own = [self.plan.config] if self.plan else itertools.chain.from_iterable(each)
        return list(dict.fromkeys(own))

    @property
    def finished(self) -> bool:
        """Whether every run is done, those that were planned and have not begun included."""
        if not all(track.finished for _, track in self.tracks):
            return False
        planned = len(self.plan.seeds) * len(self.groups) if self.plan else 0
        if self.plan and self.plan.until and len(self.tracks) >= planned:
            planned = len(seeds_of(self.plan, entries(self.plan))) * len(self.groups)
        return len(self.tracks) >= planned

    def conclusion(self) -> Conclusion | None:
        """The result of a comparison that is done."""
        return conclude(self.plan) if self.plan and self.finished else None

    def outcomes(self) -> list[Outcome]:
        """What came out for each group whose runs are all done."""
        done = {k: v for k, v in self.groups.items() if all(r.finished and r.summary for r in v)}
        return [
            Outcome(
                Entry(label, tracks[0].config.method, tracks[0].config.lr),
                [track.path for track in tracks],
                [track.summary or {} for track in tracks],
            )
            for label, tracks in done.items()
        ]

    def differences(self) -> list[Difference]:
        """The first group against the others, where all have the same seeds."""
        outcomes = self.outcomes()
        seeds = {tuple(int(seed) for seed in one.values("seed")) for one in outcomes}
        if len(seeds) != 1 or len(outcomes) < len(self.groups):
            return []
        scores = {one.entry.label: one.values("accuracy_client_mean") for one in outcomes}
        return differences(scores, outcomes[0].entry.label)

    def commands(self) -> list[str]:
        """What to type to run it again."""
        if self.plan:
            return [compare_command(self.plan)]
        return [_command(track) for _, track in self.tracks]


# -- finding them


def find_studies(paths: Sequence[Path], known: dict[Path, Track] | None = None) -> list[Study]:
    """The studies in folders.

    Args:
        paths: Run folders, comparisons' folders, or folders of such.
        known: Tracks by folder, to go on with; new ones are added.

    Raises:
        ValueError: There is no run in any of them.
    """
    known = {} if known is None else known
    found, twice = _each_once([one for path in paths for one in _folders(path, DEEPEST)])
    unread: list[str] = []
    comparisons = [path for path in found if (path / PLAN).is_file()]
    inside = {path.resolve() for path in comparisons}
    whole = [(path, path.resolve()) for path in found]
    apart = [path for path, at in whole if inside.isdisjoint([at, *at.parents])]
    loose = _readable(apart, known, unread)
    plans = _each_read(load_plan, comparisons, unread)
    studies = [_comparison(plan, known, unread) for plan in plans]
    studies = [study for study in studies if study.tracks] + list(_loose(loose, known))
    if not studies:
        where = ", ".join(map(str, paths))
        raise ValueError(
            " ".join([f"There is no run in {where}; `plait run --out` makes one.", *unread])
        )
    first = dataclasses.replace(studies[0], remarks=(*twice, *unread, *studies[0].remarks))
    return [first, *studies[1:]]


def read_studies(paths: Sequence[Path]) -> list[Study]:
    """The studies in folders, with all that their runs have said so far.

    Raises:
        ValueError: There is no run in any of the folders.
    """
    studies = find_studies(paths)
    for study in studies:
        for _, track in study.tracks:
            track.read()
    return studies


def _each_once(found: Sequence[Path]) -> tuple[list[Path], tuple[str, ...]]:
    """Folders without those that are there already, perhaps by another name; what was left out."""
    once: dict[Path, list[Path]] = {}
    for path in found:
        once.setdefault(path.resolve(), []).append(path)
    remarks = tuple(
        f"{names[0]} was given {len(names)} times, by whatever name; it counts once."
        for names in once.values()
        if len(names) > 1
    )
    return [names[0] for names in once.values()], remarks


def _folders(path: Path, depth: int) -> Iterator[Path]:
    """Folders of comparisons, and of runs outside of comparisons."""
    if (path / PLAN).is_file() or _is_run(path):
        yield path
    elif depth and path.is_dir():
        # A sweep's search for learning rates is shown while there is nothing else.
        left_out = {"adapters"} | ({"tuning"} if any(path.glob("runs/*/config.json")) else set())
        for child in sorted(path.iterdir()):
            if child.is_dir() and child.name not in left_out:
                yield from _folders(child, depth - 1)


def _is_run(path: Path) -> bool:
    return (path / "config.json").is_file() and (path / "events.jsonl").is_file()


def _track(path: Path, known: dict[Path, Track]) -> Track:
    if path not in known or known[path].is_outdated:
        known[path] = Track.open(path)
    track = known[path]
    finished = track.finished  # asked first: it is written last
    track.read()
    if finished and not track.unread_lines:
        check_events(path, track.evaluations[-1].scores if track.evaluations else [])
    return track


def _readable(paths: Iterable[Path], known: dict[Path, Track], unread: list[str]) -> list[Track]:
    """The runs in folders; what of them this plait can't read is said in `unread`."""
    tracks = _each_read(lambda path: _track(path, known), paths, unread)
    unread += [
        f"Of {track.path}/events.jsonl {track.unread_lines} of the lines can't be read here and "
        "are left out."
        for track in tracks
        if track.unread_lines
    ]
    return tracks


def _each_read(
    read: Callable[[Path], Read], paths: Iterable[Path], unread: list[str]
) -> list[Read]:
    found: list[Read] = []
    for path in paths:
        try:
            found.append(read(path))
        except (ValueError, TypeError, KeyError) as error:
            unread.append(f"{path} can't be read here and is left out: {error}")
    return found


def _comparison(plan: Plan, known: dict[Path, Track], unread: list[str]) -> Study:
    most = plan.first_seeds(plan.at_most) if plan.until else plan.seeds
    places = {label: [run_folder(plan, label, s) for s in most] for label in plan.labels}
    if not any(map(_is_run, (path for paths in places.values() for path in paths))):
        # Still at the search for learning rates.
        places = {}
        for cell in search_cells(plan):
            places.setdefault(cell.label, []).append(cell.folder)
    groups = {
        label: _readable(filter(_is_run, paths), known, unread) for label, paths in places.items()
    }
    return Study(plan.out.resolve().name, {k: v for k, v in groups.items() if v}, plan)


def _joined(tracks: Sequence[Track], known: dict[Path, Track]) -> list[Track]:
    """The runs, with the peers of a federation as one."""
    found: list[Track] = []
    peers: dict[tuple[Config, Path], list[Track]] = {}
    for track in tracks:
        track.read()
        if track.sees_itself_alone:
            peers.setdefault((in_common(track.config), _federation(track.path)), []).append(track)
        else:
            found.append(track)
    for parts in peers.values():
        parts.sort(key=lambda track: _natural(track.path))
        place = Path(os.path.commonpath([track.path.resolve() for track in parts]))
        # `plait up` and `plait init-federation` have the peers in a folder of this name.
        place = place.parent if place.name == "federation" else place
        joined = known.get(place)
        if not isinstance(joined, JoinedPeers) or joined.parts != parts:
            known[place] = JoinedPeers(place, parts)
        known[place].read()
        found.append(known[place])
    return found


def _federation(path: Path) -> Path:
    """The folder of a peer's federation: two with the same settings are two runs."""
    peer = path.resolve()
    return peer.parent.parent if peer.name == "out" else peer.parent


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Sorts peer-10 behind peer-9."""
    parts = re.split(r"(\d+)", str(path))
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _loose(tracks: Sequence[Track], known: dict[Path, Track]) -> Iterator[Study]:
    for task in dict.fromkeys(track.config.task for track in tracks):
        mine = _joined([track for track in tracks if track.config.task == task], known)
        groups, remarks = _groups(mine)
        counted = sum(map(len, groups.values()))
        title = mine[0].title if counted == 1 else f"Runs on {task}"
        alone = tuple(
            f"Of the {track.config.clients} peers "
            f"{', '.join(map(track.name_of, track.here))} alone "
            f"{'is' if len(track.here) == 1 else 'are'} here."
            for tracks in groups.values()
            for track in tracks
            if track.sees_itself_alone
        )
        yield Study(title, groups, remarks=remarks + alone)


def _groups(tracks: Sequence[Track]) -> tuple[dict[str, list[Track]], tuple[str, ...]]:
    """Label -> runs that differ in their seed alone, each seed once; and what was left out."""
    alike: dict[Config, list[list[Track]]] = {}
    for track in tracks:
        groups = alike.setdefault(dataclasses.replace(track.config, seed=0), [])
        there = next((group for group in groups if _read_the_same(group[0], track)), None)
        if there is None:
            groups.append([track])
        else:
            there.append(track)
    labelled: dict[str, list[Track]] = {}
    remarks: list[str] = []
    for name, groups in zip(_labels(list(alike)), alike.values(), strict=True):
        for number, group in enumerate(groups, 1):
            own = name if len(groups) == 1 else f"{name}, data {number}"
            while own in labelled:  # settings that are different and written alike
                own += "'"
            labelled[own] = _seeds_once(group, remarks)
    return labelled, tuple(remarks)


def _read_the_same(one: Track, other: Track) -> bool:
    """Whether two runs of the same settings read the same rows and files, as far as is known."""
    a, b = one.fingerprints, other.fingerprints
    return all(a[key] == b[key] for key in a.keys() & b.keys() if key != "clients' shares")


def _seeds_once(group: Sequence[Track], remarks: list[str]) -> list[Track]:
    """One run for each seed, by seed: of several the one that has come farthest."""
    seeds: dict[int, list[Track]] = {}
    for track in group:
        seeds.setdefault(track.config.seed, []).append(track)
    for seed, runs in seeds.items():
        if len(runs) > 1:
            for track in runs:
                track.read()
            runs.sort(key=lambda track: (not track.finished, -len(track.rounds)))
            others = ", ".join(str(track.path) for track in runs[1:])
            remarks.append(
                f"{others}: the same settings and seed ({seed}) as {runs[0].path}; "
                "they count once, as one run."
            )
    return [seeds[seed][0] for seed in sorted(seeds)]


def _labels(configs: Sequence[Config]) -> list[str]:
    """The method of each, with the settings in which it differs from more than half of them."""
    values = [config.to_json() for config in configs]
    usual = {key: _usual([str(one[key]) for one in values]) for key in values[0]}
    return [
        ", ".join(
            [one["method"]]
            + [
                f"{_words(key)} {value}"
                for key, value in one.items()
                if key not in ("method", "seed") and str(value) != usual[key]
            ]
        )
        for one in values
    ]


def _usual(values: Sequence[str]) -> str | None:
    """The value that more than half are, if there is one."""
    value, count = Counter(values).most_common(1)[0]
    return value if 2 * count > len(values) else None


def _words(name: str) -> str:
    return name.replace("_", " ")


# -- the commands that run them again


def _command(track: Track) -> str:
    if not isinstance(track, JoinedPeers):
        return run_command(track.config, track.path.name)
    if len(track.configs) > 1:  # peers that brought what they have
        return "plait peer --config federation.toml --name NAME"
    return up_command(track.config, track.path.name)


def run_command(config: Config, out: str) -> str:
    """The `plait run` of a config."""
    return shlex.join(["plait", "run", *flags(config), "--out", out])


def up_command(config: Config, out: str) -> str:
    """The `plait up` that has the peers of a federation on one machine."""
    words = flags(config, leave_out=("clients",))
    return shlex.join(["plait", "up", "--peers", str(config.clients), *words, "--out", out])


def compare_command(plan: Plan) -> str:
    """The `plait compare` of a plan."""
    words = ["plait", "compare", *flags(plan.config, leave_out=("method", "seed"))]
    words += ["--methods", ",".join(plan.methods), "--seeds", ",".join(map(str, plan.seeds))]
    if plan.until:
        words += ["--until", f"{plan.until:g}", "--at-most", str(plan.at_most)]
    if plan.lrs:
        words += ["--lrs", ",".join(f"{method}={lr!r}" for method, lr in plan.lrs.items())]
    if plan.lr_grid:
        words += ["--lr-grid", ",".join(map(repr, plan.lr_grid))]
    words += [] if plan.matched_control else ["--no-matched-control"]
    return shlex.join([*words, "--out", plan.out.resolve().name])


def flags(config: Config, leave_out: Iterable[str] = ()) -> list[str]:
    """The flags of the settings that are not at their defaults.

    Example:
        >>> flags(Config(rank=4, clip_norm=None))
        ['--rank', '4', '--clip-norm', 'None']
    """
    default: dict[str, Any] = Config().to_json()
    changed = {key: value for key, value in config.to_json().items() if value != default[key]}
    pairs = [(key, value) for key, value in changed.items() if key not in leave_out]
    return [word for key, value in pairs for word in (f"--{key.replace('_', '-')}", str(value))]


def settings(*configs: Config) -> list[tuple[str, str, bool]]:
    """Name, value or values, and whether they are not the default, of every setting."""
    default = Config()
    found: list[tuple[str, str, bool]] = []
    for field in dataclasses.fields(default):
        values = list(dict.fromkeys(getattr(config, field.name) for config in configs))
        other = values != [getattr(default, field.name)]
        found.append((field.name, ", ".join(map(str, values)), other))
    return found
