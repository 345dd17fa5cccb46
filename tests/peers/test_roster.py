"""Versions of the list of members: what follows from what, and who has signed it."""

from __future__ import annotations

import dataclasses

import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import of_another_version
from plait.config import Config
from plait.peers.certificates import make_authority, make_certificate
from plait.peers.federation import Federation, Member
from plait.peers.membership import Members
from plait.peers.roster import (
    Roster,
    Trust,
    after,
    check_quorum,
    first,
    read_roster,
    sign,
    signers,
    voters,
    write_roster,
)

AUTHORITY, OTHER = make_authority("trial"), make_authority("other")
TRUSTED = Trust(x509.load_pem_x509_certificates(AUTHORITY.certificate))
PAIRS = {name: make_certificate(AUTHORITY, name) for name in ("ada", "ben", "cai", "dan")}
FIRST = Roster(
    federation="f", version=1, from_round=0, follows="",
    peers=tuple(Member(name=n, address=f"{n}:7600") for n in ("ada", "ben", "cai")),
)  # fmt: skip
DAN = Member(name="dan", address="dan:7600")
NEXT = after(FIRST, 30, join=[DAN], leave=["cai"])


def signed(roster: Roster, *names: str, pairs=None) -> Roster:
    for name in names:
        pair = (pairs or PAIRS)[name]
        roster = sign(roster, name, pair.certificate, pair.key)
    return roster


def test_the_next_list_has_who_joins_and_who_leaves():
    assert [(p.name, p.joins, p.leaves) for p in NEXT.peers] == [
        ("ada", 0, None), ("ben", 0, None), ("cai", 0, 30), ("dan", 30, None)
    ]  # fmt: skip
    assert (NEXT.version, NEXT.follows) == (2, FIRST.digest)
    assert voters(FIRST, NEXT) == ["ada", "ben", "cai"]


def test_what_is_written_is_read():
    roster = signed(NEXT, "ada", "ben")
    assert read_roster(write_roster(roster)) == roster


@pytest.mark.parametrize("names", [("ada", "ben"), ("cai", "ada"), ("ada", "ben", "cai")])
def test_a_majority_is_enough(names):
    check_quorum(FIRST, signed(NEXT, *names), TRUSTED)


@pytest.mark.parametrize(
    ("names", "why"),
    [
        ((), "2 members and has those of nobody"),
        (("ada",), "2 members and has those of ada"),
        (("ada", "ada"), "2 members and has those of ada"),
        (("ada", "dan"), "those of ada; dan is no member who may sign"),
    ],
)
def test_less_is_not(names, why):
    with pytest.raises(ValueError, match=why):
        check_quorum(FIRST, signed(NEXT, *names), TRUSTED)


def test_one_that_has_left_signs_nothing_any_more():
    later = after(NEXT, 40, leave=["dan"])
    assert voters(NEXT, later) == ["ada", "ben", "dan"]


@pytest.mark.parametrize(
    ("pair", "why"),
    [
        (make_certificate(OTHER, "ben"), "not taken"),
        (make_certificate(AUTHORITY, "ben", days=-1), "not taken"),
        (PAIRS["cai"], "another's certificate"),
        (dataclasses.replace(PAIRS["ben"], key=PAIRS["cai"].key), "something else"),
    ],
    ids=["authority", "expired", "another's", "key"],
)
def test_a_signature_that_proves_nothing_counts_for_nothing(pair, why):
    roster = signed(NEXT, "ada", "ben", pairs={"ada": PAIRS["ada"], "ben": pair})
    names, wrong = signers(FIRST, roster, TRUSTED)
    assert names == ["ada"]
    assert len(wrong) == 1
    assert why in wrong[0]


def test_a_certificate_that_no_parser_takes_signs_nothing():
    """OpenSSL's parsers raise errors of many types; this one is no `ValueError`."""
    odd = dataclasses.replace(
        PAIRS["ben"], certificate=of_another_version(PAIRS["ben"].certificate)
    )
    for trust in (TRUSTED, None):
        names, wrong = signers(FIRST, signed(NEXT, "ada", "ben", pairs=PAIRS | {"ben": odd}), trust)
        assert names == ["ada"]
        assert "InvalidVersion" in wrong[0]


def test_a_revoked_certificate_signs_nothing():
    roster = signed(NEXT, "ada", "ben")
    names, wrong = signers(
        FIRST, roster, Trust(TRUSTED.authorities, PAIRS["ben"].certificate.__eq__)
    )
    assert (names, wrong) == (["ada"], ["ben was revoked"])


@pytest.mark.parametrize(
    "pair",
    [make_certificate(OTHER, "ben"), make_certificate(AUTHORITY, "ben", days=-1)],
    ids=["authority", "expired"],
)
def test_a_list_that_counted_once_counts_whatever_became_of_certificates(pair):
    roster = signed(NEXT, "ada", "ben", pairs={"ada": PAIRS["ada"], "ben": pair})
    assert signers(FIRST, roster, None) == (["ada", "ben"], [])


@pytest.mark.parametrize(
    "pair",
    [PAIRS["cai"], dataclasses.replace(PAIRS["ben"], key=PAIRS["cai"].key)],
    ids=["another's", "key"],
)
def test_and_a_signature_that_never_was_one_still_counts_for_nothing(pair):
    roster = signed(NEXT, "ada", "ben", pairs={"ada": PAIRS["ada"], "ben": pair})
    assert signers(FIRST, roster, None)[0] == ["ada"]


@pytest.mark.parametrize(
    "change",
    [
        {"from_round": 31},
        {"version": 3},
        {"federation": "g"},
        {"follows": "0" * 64},
        {"peers": NEXT.peers[:3]},
        {"peers": (*NEXT.peers[:3], dataclasses.replace(DAN, joins=31))},
        {"peers": (*NEXT.peers[:3], dataclasses.replace(NEXT.peers[3], address="evil:1"))},
    ],
)
def test_whatever_is_changed_after_signing_shows(change):
    roster = dataclasses.replace(signed(NEXT, "ada", "ben", "cai"), **change)
    with pytest.raises(ValueError, match=r"signed something else|after|list"):
        check_quorum(FIRST, roster, TRUSTED)


@pytest.mark.parametrize(
    ("peers", "why"),
    [
        (FIRST.peers[1:], "ben has the place of ada"),
        (FIRST.peers[:2], "cai is left out"),
        ((*FIRST.peers, dataclasses.replace(DAN, joins=29)), "dan joins at round 29"),
        ((*FIRST.peers[:2], dataclasses.replace(FIRST.peers[2], leaves=12)), "leaves at round 12"),
        ((*FIRST.peers[:2], dataclasses.replace(FIRST.peers[2], joins=3)), "joins at round 3"),
    ],
)
def test_the_past_and_the_places_stay(peers, why):
    with pytest.raises(ValueError, match=why):
        check_quorum(FIRST, dataclasses.replace(NEXT, peers=peers), TRUSTED)


def test_nobody_joins_where_the_scale_depends_on_how_many_there_are():
    config = Config(task="chat", topology="complete", clients=3, scale="sfed", rounds=40)
    for scale in ("lora", "sfed"):
        federation = Federation(
            id="f", config=dataclasses.replace(config, scale=scale), peers=FIRST.peers
        )
        members = Members(federation)
        joined = after(first(federation), 30, join=[DAN])
        if scale == "lora":
            members.add(joined)
        else:
            with pytest.raises(ValueError, match="with --scale sfed the model depends on how many"):
                members.add(joined)


def test_an_address_may_change():
    moved = (dataclasses.replace(FIRST.peers[0], address="new:1"), *FIRST.peers[1:])
    roster = dataclasses.replace(NEXT, peers=moved)
    check_quorum(FIRST, signed(roster, "ada", "ben"), TRUSTED)


@pytest.mark.parametrize("text", ["a = " + "[" * 20000, "version = " + "9" * 5000, "version = "])
def test_what_is_no_toml_is_a_line(text):
    with pytest.raises(ValueError, match="it is not TOML"):
        read_roster(text)


@pytest.mark.parametrize("names", [["dan"], ["ada", "eve"]])
def test_a_name_that_is_nobodys_is_said(names):
    with pytest.raises(ValueError, match="There is no peer"):
        after(FIRST, 30, leave=names)


@settings(max_examples=300)
@given(st.text(max_size=200))
def test_whatever_comes_is_read_or_refused(text):
    for written in (text, write_roster(NEXT).replace("30", text, 1), write_roster(NEXT) + text):
        try:
            read_roster(written)
        except ValueError:
            continue
