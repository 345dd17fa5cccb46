"""Where a peer begins and from what: no single member decides, and no minority of liars."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace

import pytest
import torch

from fake_network import Hub, member, start_peer
from plait.config import Config
from plait.factors import VALUE, Factor
from plait.methods import METHODS, build_method
from plait.peers.codec import Answer, Message
from plait.peers.exchange import Terms
from plait.peers.joining import Entrance
from plait.peers.process import state_of, voters_of
from plait.peers.quorum import Quorum, middle, shared_by_most

FAR = 10**6


def quorum(num_others: int, trusted: int | None = None) -> Quorum:
    return Quorum(voters=lambda _: range(1, num_others + 1), trusted=trusted)


# -- the round


@pytest.mark.parametrize("num_others", range(1, 8))
def test_a_minority_of_liars_moves_nobody_whoever_is_heard(num_others):
    """Whatever they claim, and whichever of the honest were heard of: never past an honest one."""
    for num_liars in range((num_others - 1) // 2 + 1):
        for heard in range(num_others - num_liars + 1):
            claims = {k + 1: FAR if k < num_liars else 7 for k in range(num_liars + heard)}
            assert quorum(num_others).reached(claims) <= 7
    assert quorum(1).reached({1: FAR}) == 0, "one voice alone is no majority"


def test_a_majority_of_the_members_and_not_of_those_that_were_heard():
    five = quorum(4)
    assert five.reached({}) == 0
    assert five.reached({1: 9, 2: 9}) == 0
    assert five.undecided(9, {1: 9, 2: 9})
    assert five.reached({1: 9, 2: 8, 3: 9}) == 8
    assert not five.undecided(9, {1: 9, 2: 0, 3: 0})


def test_whom_the_operator_trusts_is_believed_alone():
    assert quorum(1, trusted=1).reached({1: 9}) == 9
    assert quorum(2, trusted=2).reached({1: FAR, 2: 9}) == 9
    assert quorum(2, trusted=2).undecided(9, {1: 9})


def test_who_has_left_or_not_joined_is_not_counted():
    spans = [{}, {"leaves": 3}, {"leaves": 3}, {}, {"joins": 8}, {}]
    voters = voters_of(lambda _: [member(f"p{k}", **span) for k, span in enumerate(spans)], 0)
    assert [sorted(voters(t)) for t in (0, 3, 4, 9)] == [
        [1, 2, 3, 5], [1, 2, 3, 5], [3, 5], [3, 4, 5],
    ]  # fmt: skip
    assert Quorum(voters=voters).reached({3: 7, 5: 6, 1: 3}) == 6


# -- the state


@pytest.mark.parametrize("num_states", [2, 3, 4, 5])
def test_each_entry_of_the_middle_lies_between_honest_ones(num_states):
    generator = torch.Generator().manual_seed(0)
    own = {"B": torch.zeros(50)}
    honest = [{"B": torch.randn(50, generator=generator)} for _ in range(num_states)]
    most = num_states // 2 if num_states % 2 == 0 else (num_states - 1) // 2
    for liars in itertools.combinations(range(num_states), most):
        states = [{"B": torch.full((50,), 1e9)} if k in liars else honest[k]
                  for k in range(num_states)]  # fmt: skip
        rows = torch.stack([own["B"]] + [honest[k]["B"] for k in range(num_states)
                                         if k not in liars])  # fmt: skip
        found = middle(own, states)["B"]
        assert (found >= rows.min(0).values).all()
        assert (found <= rows.max(0).values).all()


def test_a_single_state_is_taken_as_it_is():
    state = {"B": torch.tensor([1.0, 2.0])}
    assert torch.equal(middle({"B": torch.zeros(2)}, [state])["B"], state["B"])


# -- the way in

QUICK = Terms(round_timeout_s=1, start_timeout_s=3, linger_s=0, retry_s=0.05)


class Others:
    """A federation of `size` on a complete graph; p0 comes, the others are what they are set to."""

    def __init__(
        self, size: int, joins: int = 0, trusted: int | None = None, method: str = "adf"
    ) -> None:
        self.config = Config(topology="complete", clients=size, rounds=40, rank=2, local_steps=1,
                             batch_size=2, switch_every=2, method=method)  # fmt: skip
        self.hub = Hub()
        members = [member(f"p{k}", **({"joins": joins} if k == 0 else {})) for k in range(size)]
        self.peers = [start_peer(self.hub, k, self.config, members, terms=QUICK, keep_rounds=2)
                      for k in range(size)]  # fmt: skip
        self.me = self.peers[0]
        voters = voters_of(lambda _: members, 0)
        self.me.desk.quorum = Quorum(voters=voters, trusted=trusted)
        turn = self.me.inbox.turn
        expects = lambda done: state_of(self.me.job, turn, done)  # noqa: E731
        indivisible = self.me.job.method.mix(0).indivisible
        self.entrance = Entrance(self.me.exchange, joins, expects, indivisible)

    def down(self, *peers: int) -> None:
        for peer in peers:
            del self.hub.desks[f"p{peer}"]

    def at(self, round_: int, *peers: int) -> None:
        for peer in peers:
            self.peers[peer].inbox.skip_to(round_)
            self.peers[peer]._rest()

    def lies(self, peer: int, round_: int = FAR) -> None:
        """It claims a round, and offers a state that it made up."""
        desk, liar = self.hub.desks[f"p{peer}"], self.peers[peer]

        def answer(question):
            facts = {"round": round_}
            if question.kind != "state":
                return Answer(facts)
            rows = {(VALUE, f): torch.full_like(v[0], 100.0)
                    for f, v in liar.stack.factors.items() if f in Factor.AB}  # fmt: skip
            return Answer(facts, self.offered(liar, rows, round_))

        desk.answer = answer

    def offered(self, liar, rows, round_: int) -> Message:
        near = min(round_, self.config.rounds)
        return liar.write(rows, near, liar.inbox.turn(near - 1).active, "state")


def test_a_liar_that_is_there_first_does_not_make_the_start():
    """It is heard alone; the honest come a moment later, at round 0, where all begin."""
    others = Others(3)
    others.lies(1)
    ben = others.hub.desks.pop("p2")
    threading.Timer(1.5, lambda: others.hub.desks.__setitem__("p2", ben)).start()
    assert not others.entrance.is_late()
    assert others.me.exchange.whereabouts() == 0


def test_a_liar_alone_does_not_make_the_start_either():
    others = Others(4)
    others.lies(1)
    others.down(2, 3)
    assert not others.entrance.is_late()


def test_one_that_lost_its_state_begins_within_the_honest_ones():
    others = Others(4)
    others.at(9, 2, 3)
    others.lies(1)
    assert others.entrance.is_late()
    round_, states = others.entrance.find(), list(others.entrance.states.values())
    assert round_ == 9
    assert len(states) == 2, "what the liar calls the state of another round is not taken"


def test_a_made_up_state_of_the_right_round_moves_no_entry_past_the_honest():
    others = Others(3)
    others.at(9, 2)
    others.lies(1, 9)
    others.peers[2].stack.state |= {(VALUE, f): v + 1 for f, v in others.me.stack.factors.items()}
    others.peers[2]._rest()
    assert others.entrance.is_late()
    round_, states = others.entrance.find(), list(others.entrance.states.values())
    own = {slot: others.me.stack.state[slot][0] for slot in states[0]}
    assert round_ == 9
    for slot, row in middle(own, states).items():
        assert (row >= own[slot]).all()
        assert (row <= own[slot] + 1).all()


def test_a_state_that_most_have_is_that_of_one_of_them():
    one, other = ({"B": torch.tensor([x])} for x in (1.0, 2.0))
    assert shared_by_most({4: other, 1: one, 2: one}) == 1
    assert shared_by_most({1: one, 2: other}) is None
    assert shared_by_most({1: one, 2: one, 3: other, 4: other}) is None, "half is not most"
    assert shared_by_most({3: other}) == 3


def test_factors_of_a_basis_of_ones_own_are_taken_of_one_peer_alone():
    apart = {name for name in METHODS if build_method(Config(method=name)).mix(0).indivisible}
    assert apart == {"decaf", "flexlora", "fedrot", "fedex", "flora"}
    others = Others(3, method="fedex")
    others.peers[2].stack.state[VALUE, Factor.BASE_A] += 1
    others.at(9, 1, 2)
    with pytest.raises(ValueError, match=r"those of p1, p2 differ: start p0 again .*--trust p1"):
        others.entrance.find()


def test_a_state_of_another_phase_or_with_other_factors_is_not_taken():
    others = Others(3)
    others.at(9, 1, 2)
    liar = others.peers[1]
    rows = {(VALUE, Factor.B): liar.stack.factors[Factor.B][0]}
    wrong = liar.write(rows, 9, liar.inbox.turn(8).active, "state")
    phase = "A" if liar.inbox.turn(8).active == "B" else "B"
    header = wrong.header.__class__(**(vars(wrong.header) | {"active": phase}))
    found = others.entrance._wrong(wrong.header, 9), others.entrance._wrong(header, 9)
    assert all("a state with" in one for one in found)
    assert "of round 30" in others.entrance._wrong(SimpleNamespace(kind="state", round=30), 9)


def test_of_two_peers_the_operator_says_whom_to_trust():
    others = Others(2)
    others.lies(1, 9)
    with pytest.raises(ValueError, match=r"p1 says round 9.*--trust p1"):
        others.entrance.is_late()
    with pytest.raises(ValueError, match="--trust p1"):
        others.me.exchange.whereabouts()
    trusting = Others(2, trusted=1)
    trusting.at(9, 1)
    assert trusting.entrance.is_late()
    assert trusting.entrance.find() == 9
    assert len(trusting.entrance.states) == 1


def test_two_peers_that_begin_together_need_no_word():
    others = Others(2)
    assert not others.entrance.is_late()


def test_one_that_joins_waits_for_a_majority():
    others = Others(4, joins=6)
    others.lies(1)
    others.at(5, 2, 3)
    threading.Timer(1.5, lambda: others.at(6, 2, 3)).start()
    assert others.entrance.find() == 6
    with pytest.raises(ValueError, match="--trust p1"):
        Others(2, joins=6).entrance.find()


def test_one_state_is_too_few():
    others = Others(3)
    others.at(9, 2, 1)
    others.hub.desks["p1"].resting = None
    assert others.entrance.is_late()
    with pytest.raises(ValueError, match=r"has that of p2.*--trust p2"):
        others.entrance.find()


def test_one_liar_makes_nobody_skip_ahead():
    others = Others(4)
    others.me.desk.heard_of(1, FAR)
    others.me.desk.heard_of(2, 1)
    assert others.me._catch_up() == 0
    others.at(9, 2, 3)
    others.me.exchange._survey_due = 0.0
    others.lies(1)
    others.me.desk.heard_of(1, FAR)
    assert others.me._catch_up() == 9, "by the word of a majority, which was asked"
