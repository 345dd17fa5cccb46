"""Who takes part from which round on: versions of the list of members, each signed by a quorum.

`federation.toml` has the first version. A later one is a file of its own: the whole list, the round
from which it holds, and signatures of members. It counts when more than half of those who take part
by then, under the version before it, have signed it with the keys of their certificates; which
version it follows is signed, too. A client's number is its place in the list, so a list only grows
at its end, and one that leaves stays in it.

    federation = "reviews"
    version = 2
    from_round = 30
    follows = "4f1c..."             # the digest of version 1

    [[peers]] ...                   # as in federation.toml
    [[signatures]]
    name = "ada"
    certificate = '''-----BEGIN CERTIFICATE-----...'''
    signature = "MEUC..."           # base64, of `Roster.signed`
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.verification import PolicyBuilder, Store

from plait.peers.federation import Federation, Member, toml_lines
from plait.peers.pem import dns_names, parsing

MOST_BYTES = 1 << 16
"""The most that a list may have, signatures and certificates included."""

PSS = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.MAX_LENGTH)


@dataclass(frozen=True, kw_only=True)
class Signature:
    """A member's signature, with the certificate that belongs to its key."""

    name: str
    certificate: str
    signature: str


@dataclass(frozen=True)
class Trust:
    """Whose signatures count now.

    Attributes:
        authorities: Those whose certificates are trusted.
        revoked: Certificate, PEM -> whether it was revoked.
    """

    authorities: Sequence[x509.Certificate]
    revoked: Callable[[bytes], bool] = lambda _: False


@dataclass(frozen=True, kw_only=True)
class Roster:
    """A version of the list of members.

    Attributes:
        federation: The federation's id.
        version: 1 is federation.toml's.
        from_round: The first round for which it holds.
        follows: The digest of the version before it.
        peers: In the order of the clients.
        signatures: Whoever agrees.
    """

    federation: str
    version: int
    from_round: int
    follows: str
    peers: tuple[Member, ...]
    signatures: tuple[Signature, ...] = ()

    @property
    def signed(self) -> bytes:
        """What members sign: all of it but the signatures."""
        values = dataclasses.asdict(dataclasses.replace(self, signatures=()))
        return b"plait members\n" + json.dumps(values, sort_keys=True).encode()

    @property
    def digest(self) -> str:
        """Of what is signed: 64 hex digits."""
        return hashlib.sha256(self.signed).hexdigest()


def first(federation: Federation) -> Roster:
    """The list that federation.toml has."""
    return Roster(
        federation=federation.id, version=1, from_round=0, follows="", peers=federation.peers
    )


def after(
    roster: Roster, from_round: int, join: Sequence[Member] = (), leave: Sequence[str] = ()
) -> Roster:
    """The next version, not signed yet.

    Args:
        roster: The version that holds now.
        from_round: The first round for which the next one holds.
        join: New members.
        leave: Names of those that take part no more.

    Raises:
        ValueError: A name is not there, or there already.
    """
    names = [peer.name for peer in roster.peers]
    unknown = sorted(set(leave) - set(names))
    if unknown:
        raise ValueError(f"There is no peer {unknown[0]!r}; there are {', '.join(names)}.")
    stay = tuple(
        dataclasses.replace(peer, leaves=from_round) if peer.name in leave else peer
        for peer in roster.peers
    )
    new = tuple(dataclasses.replace(peer, joins=from_round) for peer in join)
    follower = dataclasses.replace(
        roster, version=roster.version + 1, from_round=from_round, follows=roster.digest,
        peers=stay + new, signatures=(),
    )  # fmt: skip
    check_follows(roster, follower)
    return follower


def sign(roster: Roster, name: str, certificate: bytes, key: bytes) -> Roster:
    """The same with a member's signature, in the place of an earlier one.

    Args:
        roster: What to sign.
        name: The member.
        certificate: Its certificate, PEM.
        key: Its private key, PEM.
    """
    secret = serialization.load_pem_private_key(key, None)
    if isinstance(secret, ec.EllipticCurvePrivateKey):
        signature = secret.sign(roster.signed, ec.ECDSA(hashes.SHA256()))
    else:
        assert isinstance(secret, rsa.RSAPrivateKey), "checked when the peer's files were read"
        signature = secret.sign(roster.signed, PSS, hashes.SHA256())
    made = Signature(
        name=name, certificate=certificate.decode(), signature=base64.b64encode(signature).decode()
    )
    others = tuple(one for one in roster.signatures if one.name != name)
    return dataclasses.replace(roster, signatures=(*others, made))


def check_follows(before: Roster, roster: Roster) -> None:
    """Refuse a list that doesn't follow from another.

    Raises:
        ValueError: With what is wrong.
    """
    expected = (before.federation, before.version + 1, before.digest)
    if (roster.federation, roster.version, roster.follows) != expected:
        raise ValueError(
            f"the list is version {roster.version} of {roster.federation!r:.80} after "
            f"{roster.follows:.12}, and the one here is version {before.version} of "
            f"{before.federation!r}, {before.digest:.12}"
        )
    if roster.from_round < before.from_round:
        raise ValueError(f"it holds from round {roster.from_round}, before the one that it follows")
    for old, new in zip(before.peers, roster.peers, strict=False):
        if old.name != new.name:
            raise ValueError(f"{new.name} has the place of {old.name}; the order must stay")
        # Where somebody is reached may change; when it takes part, from then on only.
        for what in ("joins", "leaves"):
            was, is_ = getattr(old, what), getattr(new, what)
            past = was is not None and was < roster.from_round
            if was != is_ and (past or is_ is None or is_ < roster.from_round):
                raise ValueError(f"{new.name} {what} at round {is_}, before the list holds")
    if len(roster.peers) < len(before.peers):
        raise ValueError(f"{before.peers[len(roster.peers)].name} is left out; give it `leaves`")
    for new in roster.peers[len(before.peers) :]:
        if new.joins < roster.from_round:
            raise ValueError(f"{new.name} joins at round {new.joins}, before the list holds")


def voters(before: Roster, roster: Roster) -> list[str]:
    """Whose signatures count: who takes part under the version before, when the next one begins."""
    round_ = max(0, roster.from_round - 1)
    return [peer.name for peer in before.peers if peer.takes_part(round_)]


def signers(before: Roster, roster: Roster, trust: Trust | None) -> tuple[list[str], list[str]]:
    """Whoever has signed a list, and why other signatures don't count.

    Args:
        before: The version before it.
        roster: The list.
        trust: Whose certificates count; None for a list that counted once, whose certificates may
            have ended or been revoked since.
    """
    names, wrong = set[str](), list[str]()
    for one in roster.signatures:
        why = _wrong(roster, one, trust)
        if one.name not in voters(before, roster):
            why = "is no member who may sign"
        if why:
            wrong.append(f"{one.name:.63} {why}")
        else:
            names.add(one.name)
    return sorted(names), wrong


def check_quorum(before: Roster, roster: Roster, trust: Trust | None) -> None:
    """Refuse a list that doesn't follow, or that too few have signed.

    Args:
        before: The version that holds.
        roster: The list.
        trust: As for `signers`.

    Raises:
        ValueError: With what is wrong.
    """
    check_follows(before, roster)
    signed, wrong = signers(before, roster, trust)
    needed = len(voters(before, roster)) // 2 + 1
    if len(signed) < needed:
        have = ", ".join(signed) or "nobody"
        raise ValueError(
            f"version {roster.version} of the list needs the signatures of {needed} members and "
            f"has those of {have}" + "".join(f"; {one}" for one in wrong)
        )


def _wrong(roster: Roster, one: Signature, trust: Trust | None) -> str:
    """Why a signature doesn't count; empty if it does."""
    try:
        with parsing():
            chain = x509.load_pem_x509_certificates(one.certificate.encode())
            names = _names_of(chain, trust)
            signature = base64.b64decode(one.signature, validate=True)
            _verify(chain[0].public_key(), signature, roster.signed)
    except ValueError as error:
        return f"has a certificate that is not taken ({error!s:.100})"
    except InvalidSignature:
        return "has signed something else"
    if one.name not in names:
        return "has signed with another's certificate"
    return "was revoked" if trust and trust.revoked(one.certificate.encode()) else ""


def _names_of(chain: Sequence[x509.Certificate], trust: Trust | None) -> list[str]:
    if trust is None:
        return dns_names(chain[0])
    verifier = PolicyBuilder().store(Store(list(trust.authorities))).build_client_verifier()
    found = verifier.verify(chain[0], list(chain[1:])).subjects or ()
    return [str(name.value) for name in found]


def _verify(key: Any, signature: bytes, data: bytes) -> None:
    if isinstance(key, ec.EllipticCurvePublicKey):
        key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    elif isinstance(key, rsa.RSAPublicKey):
        key.verify(signature, data, PSS, hashes.SHA256())
    else:
        raise ValueError("a key of another kind")


# -- as text


def write_roster(roster: Roster) -> str:
    """The text of a list's file."""
    head = {
        name: getattr(roster, name) for name in ("federation", "version", "from_round", "follows")
    }
    lines = [f"# Who takes part from round {roster.from_round} on.", *toml_lines(head)]
    for peer in roster.peers:
        lines += ["", "[[peers]]", *toml_lines(peer.written())]
    for one in roster.signatures:
        lines += ["", "[[signatures]]", *toml_lines(vars(one))]
    return "\n".join(lines) + "\n"


def read_roster(text: str) -> Roster:
    """The list that a file, or another peer, has; its signatures are not looked at.

    Raises:
        ValueError: It is none.
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"a list of members has at most {MOST_BYTES} bytes, this {len(text)}")
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not TOML: {error!s:.200}") from None
    try:
        return Roster(
            **_typed(values, federation=str, version=int, from_round=int, follows=str),
            peers=tuple(Member(**_member(one)) for one in _tables(values, "peers")),
            signatures=tuple(
                Signature(**_typed(one, name=str, certificate=str, signature=str))
                for one in _tables(values, "signatures")
            ),
        )
    except (TypeError, KeyError) as error:
        raise ValueError(f"it is no list of members: {error!s:.200}") from None


def _member(table: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {"name": str, "address": str, "reachable": bool, "joins": int, "leaves": int}
    given = {name: kind for name, kind in kinds.items() if name in table}
    if unknown := sorted(table.keys() - kinds.keys()):
        raise KeyError(f"unknown {unknown[0]}")
    return _typed(table, **given)


def _typed(table: Mapping[str, Any], **kinds: type) -> dict[str, Any]:
    for name, kind in kinds.items():
        if type(table[name]) is not kind:
            raise TypeError(f"{name} is {table[name]!r:.80}")
    return {name: table[name] for name in kinds}


def _tables(values: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    tables = values.get(name, [])
    if not isinstance(tables, list) or not all(isinstance(one, dict) for one in tables):
        raise TypeError(f"{name} holds {tables!r:.80}")
    return tables
