"""A federation as files: who takes part, with what settings, and what each peer has of its own.

    federation.toml    the same at every peer: id, members, limits, the settings of the run
    ca.pem             whose certificates are trusted
    revoked.txt        which of them are not any more
    <name>/peer.toml   a few lines of one peer: where it listens, its certificate, its data
    <name>/cert.pem, key.pem

Paths in `peer.toml` are relative to it. `init_federation` (certificates.py) writes all of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import ipaddress
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

from plait.config import Config, FileSettings, Machine, names_of
from plait.data.sources import is_hub_name
from plait.machine.text_files import read_text
from plait.presets import fits

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
"""A peer's name is a DNS label, so that it can stand in a certificate."""

OF_MACHINE = names_of(Machine) - {"engine", "workers"}
LOCAL_SETTINGS = names_of(FileSettings) | OF_MACHINE
"""Settings of a run in which the peers of a federation may differ."""

OWN_SETTINGS = LOCAL_SETTINGS | {"backbone"}
"""What a peer may set for itself: these, and where its copy of the frozen model lies."""

PATHS = {"glue_dir", "train_file", "dev_file", "backbone"}
"""Those that are paths, relative to `peer.toml`."""

RELAY = "relay"
"""The name of the relay, in its certificate and of its folder."""

HOST = re.compile(r"\[(?P<v6>[0-9a-fA-F:.]+(%\w+)?)\]|[\w.-]+")
"""A name, an IPv4 address, or an IPv6 address in brackets."""

Table = TypeVar("Table")


def check_name(name: str) -> None:
    """Refuse, with a `ValueError`, what can't be a peer's name."""
    if not NAME.fullmatch(name):
        raise ValueError(f"A peer is named {name!r}; take up to 63 of a-z, 0-9 and inner hyphens.")


def in_common(config: Config) -> Config:
    """The settings that all peers share, what a peer may set for itself at its default."""
    default = Config()
    return dataclasses.replace(
        config, **{name: getattr(default, name) for name in OWN_SETTINGS & names_of(Config)}
    )


@dataclass(frozen=True, kw_only=True)
class Member:
    """A peer as all others know it.

    Attributes:
        name: Also the name in its certificate.
        address: Where the others reach it, `host:port`; empty if it isn't reachable.
        reachable: Whether it accepts connections. One that doesn't opens them itself, to the
            reachable members and the relay, and is called through those.
        joins: The first round that it takes part in.
        leaves: The first round that it takes no part in any more.
    """

    name: str
    address: str = ""
    reachable: bool = True
    joins: int = 0
    leaves: int | None = None

    def __post_init__(self) -> None:
        """Refuse a name or an address that can't be one."""
        check_name(self.name)
        if self.reachable and not self.address:
            raise ValueError(
                f'{self.name} has no address; write address = "host:port" under [[peers]], or '
                "reachable = false where it accepts no connections."
            )
        if self.reachable:
            split_address(self.address)
        elif self.address:
            raise ValueError(
                f"{self.name} has the address {self.address} and reachable = false; leave one out."
            )
        if self.leaves is not None and self.leaves <= self.joins:
            raise ValueError(f"{self.name} leaves before it joins; `leaves` must be later.")

    def written(self) -> dict[str, object]:
        """What its table in a file has: all but the defaults."""
        return {k: v for k, v in vars(self).items() if v != getattr(Member, k, None)}

    def takes_part(self, round_: int) -> bool:
        """Whether it is a member in a round."""
        return self.joins <= round_ and (self.leaves is None or round_ < self.leaves)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a peer puts up with, and how long it waits.

    Attributes:
        max_message_bytes: Larger messages are refused before they are received.
        round_timeout_s: A round waits no longer for a neighbour of which nothing comes.
        start_timeout_s: Neighbours that were not heard of yet are waited for so long.
        linger_s: A peer that is done still answers for so long.
        keep_rounds: Rounds for which messages are kept, of one's own and ahead of time.
        norm_bound: The largest norm of a message's values.
        symmetric_loss: Mix over a link on both of its sides or on neither.
    """

    max_message_bytes: int = 64 << 20
    round_timeout_s: float = 600.0
    start_timeout_s: float = 600.0
    linger_s: float = 600.0
    keep_rounds: int = 8
    norm_bound: float | None = None
    symmetric_loss: bool = False

    def __post_init__(self) -> None:
        """Refuse what can't be, with the fix."""
        for name in ("max_message_bytes", "round_timeout_s", "start_timeout_s", "keep_rounds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0.")
        if not self.linger_s >= 0:
            raise ValueError(f"linger_s is {self.linger_s}; it can't be negative.")
        if self.norm_bound is not None and not self.norm_bound > 0:
            raise ValueError(f"norm_bound is {self.norm_bound}; leave it out for no bound.")


@dataclass(frozen=True, kw_only=True)
class Federation:
    """What all peers share.

    Attributes:
        id: The federation's name.
        config: The settings of the run, with one client for each peer.
        peers: In the order of the clients.
        relay: Where members meet that aren't reachable, `host:port`.
        limits: Sizes and times.
        labels: The classes in their order, when peers bring data of their own.
        read: What must be the same at all peers -> a hash of it, where it is read.
    """

    id: str
    config: Config
    peers: tuple[Member, ...]
    relay: str | None = None
    limits: Limits = Limits()
    labels: tuple[str, ...] | None = None
    read: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a federation of nobody, or with two peers of one name."""
        if not self.id:
            raise ValueError('The federation has no id; write federation = "some-name".')
        if len(self.peers) < 2:
            raise ValueError("A federation needs two peers or more; add [[peers]] tables.")
        if self.relay is not None:
            split_address(self.relay)
        for what in ("name", "address"):
            values = [one for peer in self.peers if (one := getattr(peer, what))]
            values += [RELAY if what == "name" else self.relay] if self.relay else []
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"Two peers have the {what} {twice[0]}; it must be unique.")
        if self.config.stop_after is not None:
            raise ValueError(
                "Peers can't agree on stop_after, as none sees the others' scores; leave it out of "
                "[run]."
            )
        if self.config.clients != len(self.peers):
            raise ValueError(
                f"clients is {self.config.clients}, but there are {len(self.peers)} peers; leave "
                "clients out of [run]."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The peers' names; a peer's place among them is its client's number."""
        return tuple(peer.name for peer in self.peers)

    def index(self, name: str) -> int:
        """The number of a peer's client.

        Raises:
            ValueError: It is no member.
        """
        if name not in self.names:
            raise ValueError(f"There is no peer {name!r}; there are {', '.join(self.names)}.")
        return self.names.index(name)

    def member(self, name: str) -> Member:
        """A peer by its name; a `ValueError` if there is none."""
        return self.peers[self.index(name)]

    def digest(self) -> str:
        """Sixteen hex digits that are equal when peers agree on all that must be agreed on."""
        text = json.dumps(self.shared(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def shared(self) -> dict[str, Any]:
        """What must be agreed on, flat and as JSON has it.

        Settings that are a peer's own are left out, and where the peers are reached. Of plugins
        what is in them counts, not where they lie.
        """
        config = self.config.decisive()
        shared = {
            "federation": self.id,
            **{key: config[key] for key in config.keys() - LOCAL_SETTINGS - {"plugin"}},
            **self.read,
            "peers": [(peer.name, peer.joins, peer.leaves) for peer in self.peers],
            "labels": self.labels,
            "symmetric_loss": self.limits.symmetric_loss,
        }
        return cast("dict[str, Any]", json.loads(json.dumps(shared)))


@dataclass(frozen=True, kw_only=True)
class PeerSettings:
    """What one peer has of its own.

    Attributes:
        name: Which peer it is.
        listen: Where it listens, `host:port`.
        ca: The certificate of the authority that all trust.
        certificate: Its certificate.
        key: The key of it.
        out: Its run folder.
        metrics: Where Prometheus reads its figures, `host:port`, or nowhere.
        revoked: The list of certificates that count no more, if there is one.
        http_proxy: Whether connections go through the proxy that the environment names
            (`https_proxy`, `no_proxy`), as other programs' do.
        local: Settings of the run in which it differs, such as its data, its device, or where its
            copy of the frozen model lies.
    """

    name: str
    listen: str
    ca: Path
    certificate: Path
    key: Path
    out: Path
    metrics: str | None = None
    revoked: Path | None = None
    http_proxy: bool = True
    local: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse addresses that are none, and settings that all must share."""
        split_address(self.listen)
        if self.metrics is not None:
            split_address(self.metrics)
        shared = sorted(set(self.local) - OWN_SETTINGS)
        if shared:
            raise ValueError(
                f"[local] of {self.name} sets {', '.join(shared)}; a peer may set "
                f"{', '.join(sorted(OWN_SETTINGS))}, the rest is in federation.toml."
            )

    def apply(self, config: Config) -> Config:
        """The federation's settings with this peer's own."""
        own = {name: value for name, value in self.local.items() if name not in OF_MACHINE}
        return dataclasses.replace(config, **own)

    @property
    def machine(self) -> Machine:
        """Where and how fast it computes."""
        return Machine(**{k: v for k, v in self.local.items() if k in OF_MACHINE})


def load_federation(path: Path) -> Federation:
    """Read `federation.toml`.

    Raises:
        ValueError: It isn't what it should be; the message says where and what to change.
        OSError: It can't be read.
    """
    keys = {
        "federation": str,
        "relay": str,
        "labels": list,
        "run": dict,
        "limits": dict,
        "peers": list,
    }
    values = _read(path, keys)
    try:
        peers = tuple(_build(Member, peer, "[[peers]]") for peer in values.get("peers", []))
        run = {"clients": len(peers) or 1} | values.get("run", {})
        return Federation(
            id=values.get("federation", ""),
            config=_build(Config, run, "[run]"),
            peers=peers,
            relay=values.get("relay"),
            limits=_build(Limits, values.get("limits", {}), "[limits]"),
            labels=_labels(values.get("labels")),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_peer(federation_file: Path, name: str) -> PeerSettings:
    """Read `<name>/peer.toml` beside `federation.toml`.

    Raises:
        ValueError: It isn't what it should be; the message says where and what to change.
        OSError: It can't be read.
    """
    path = federation_file.parent / name / "peer.toml"
    needed = ("ca", "certificate", "key", "out")
    paths = (*needed, "revoked")
    kinds = {"listen": str, **dict.fromkeys(paths, str), "metrics": str, "http_proxy": bool}
    values = _read(path, kinds | {"local": dict})
    missing = sorted({"listen", *needed} - values.keys())
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}.")
    local = values.get("local", {})
    relative = [key for key in PATHS & local.keys() if not _is_of_hub(path.parent, key, local[key])]
    try:
        for kind, names in ((Config, local.keys() - OF_MACHINE), (Machine, OF_MACHINE)):
            _check_types(kind, {k: v for k, v in local.items() if k in names}, "[local]")
        places = {key: path.parent / values[key] for key in paths if key in values}
        local |= {key: str(path.parent / local[key]) for key in relative}
        return PeerSettings(name=name, **(values | places | {"local": local}))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def toml_lines(values: Mapping[str, object]) -> list[str]:
    """A line of TOML for each key."""
    return [f"{key} = {_toml(value)}" for key, value in values.items()]


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.translate({ord("\\"): "\\\\", ord('"'): '\\"', ord("\n"): "\\n"})
        return f'"{escaped}"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)


def _is_of_hub(folder: Path, key: str, name: object) -> bool:
    """Whether a path of `[local]` is a name on the hub instead."""
    if key == "backbone":
        return not (folder / str(name)).is_dir()
    return is_hub_name(str(name)) and not (folder / str(name)).exists()


def split_address(address: str) -> tuple[str, int]:
    """`host:port` -> (host, port); an IPv6 host stands in brackets.

    Raises:
        ValueError: It is no such thing.

    Example:
        >>> split_address("[::1]:7600")
        ('::1', 7600)
    """
    host, _, port = address.rpartition(":")
    named = HOST.fullmatch(host)
    if named and port.isdecimal() and 0 < int(port) < 65536:
        return named["v6"] or host, int(port)
    raise ValueError(f"The address is {address!r}; write host:port, such as {_right(address)}.")


def _right(address: str) -> str:
    """What somebody may have meant who wrote an address in another form."""
    scheme, host, port = re.fullmatch(
        r"(\w+://)?(.*?)(?::(\d{1,5}))?/?", address, re.DOTALL
    ).groups()  # type: ignore[union-attr]
    if scheme and HOST.fullmatch(host) and port:
        return f"{host}:{port}"
    if host.count(":") > 1 and port and re.fullmatch(r"[0-9a-fA-F:.]+", host):
        return f"[{host}]:{port}, an IPv6 host in brackets"
    return "10.0.0.1:7600"


def is_loopback(host: str) -> bool:
    """Whether a host is an address of this machine alone; a name may lead anywhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read(path: Path, kinds: Mapping[str, type]) -> dict[str, Any]:
    try:
        values = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    unknown = sorted(values.keys() - kinds.keys())
    if unknown:
        raise ValueError(f"{path} has unknown keys {', '.join(unknown)}; take {', '.join(kinds)}.")
    for key, value in values.items():
        if type(value) is not kinds[key]:
            raise ValueError(f"{path}: {key} is {value!r}; it must be a {kinds[key].__name__}.")
    return values


def _labels(values: list[object] | None) -> tuple[str, ...] | None:
    if values is None:
        return None
    names = {value for value in values if isinstance(value, str) and value.strip()}
    if len(names) != len(values) or len(values) < 2:
        raise ValueError(f'labels is {values!r}; write two classes or more, such as ["no", "yes"].')
    return tuple(map(str, values))


def _build(kind: type[Table], values: object, where: str) -> Table:
    """A dataclass from a table of the file."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} holds {values!r}; it must be a table.")
    _check_types(kind, values, where)
    try:
        return kind(**values)
    except TypeError as error:  # a required key is missing
        raise ValueError(f"{where}: {error}") from error


def _check_types(kind: type, values: dict[str, Any], where: str) -> None:
    hints = get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"{where} has an unknown key {key}; there are {', '.join(hints)}.")
        if not fits(value, hints[key]):
            kind_name = str(hints[key]).removeprefix("typing.")
            raise ValueError(f"{where}: {key} is {value!r}; it must be {kind_name}.")
