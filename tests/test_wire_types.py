"""Messages of fewer bits: what they cost, and what they leave as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from conftest import tiny_job
from plait.config import Config
from plait.engines.steps import mix
from plait.factors import VALUE, A, B
from plait.lora import joined, values
from plait.mixing import neighbour_weights
from plait.topology import build_schedule
from plait.wire_types import INT8, OF_DTYPE, WIRE_TYPES, farthest, wire_type

CONFIG = Config(clients=4, topology="ring", rounds=2, local_steps=1, batch_size=2, rank=2)
FEWER = {
    wire: Config(**CONFIG.to_json() | {"wire": wire}) for wire in WIRE_TYPES if wire != "float32"
}
SIZES = [3, 1, 4]
MOST = 2.0**127
"""Far from where a bfloat16 becomes infinite."""


@pytest.mark.parametrize("name", WIRE_TYPES)
@settings(max_examples=25, deadline=None)
@given(values=arrays("f4", (2, sum(SIZES)), elements=st.floats(-MOST, MOST, width=32)))
def test_what_comes_out_is_what_was_rounded_and_twice_is_once(name, values):
    one, x = WIRE_TYPES[name], torch.from_numpy(values)
    rounded = one.rounded(x, SIZES)
    assert torch.equal(one.rounded(rounded, SIZES), rounded)
    for row, expected in zip(x, rounded, strict=True):
        data = one.to_array(row, SIZES).tobytes()
        assert len(data) == one.num_bytes(SIZES)
        assert torch.equal(torch.from_numpy(one.from_bytes(data, SIZES).copy()), expected)
        assert one.to_array(expected, SIZES).tobytes() == data, "as after a restart"
    assert OF_DTYPE[one.dtype] is one


@settings(max_examples=25, deadline=None)
@given(values=arrays("f4", 5, elements=st.floats(-MOST, MOST, width=32)))
def test_a_part_is_rounded_to_whole_multiples_of_its_scale(values):
    x = torch.from_numpy(values).double()
    far = (INT8.rounded(x.float(), [5]).double() - x).abs().max()
    assert far <= max(x.abs().max() / 127 / 2 * (1 + 2**-8), 2.0**-127)


@pytest.mark.parametrize("x", [0.0, 1e-45, 3.4028234663852886e38])
def test_the_smallest_and_the_largest_values_have_a_scale(x):
    found = INT8.rounded(torch.tensor([x, -x]), [2])
    assert found.isfinite().all()
    assert (found - torch.tensor([x, -x])).abs().max() <= max(x / 64, 2.0**-127)


def mixed(config, state):
    job = tiny_job(config)
    W = neighbour_weights(build_schedule(config)(0))
    return mix(job, state, state, W, 0, range(4))


def states():
    stack = tiny_job(CONFIG).initial_stack()
    generator = torch.Generator().manual_seed(0)
    return {
        slot: torch.randn(value.shape, generator=generator) for slot, value in stack.state.items()
    }


@pytest.mark.parametrize(("wire", "most"), [("bfloat16", 2**-8), ("int8", 1 / 127)])
def test_the_mean_stays_and_each_is_nearly_what_it_would_be(wire, most):
    before = states()
    after, exact = mixed(FEWER[wire], before), mixed(CONFIG, before)
    for slot, value in after.items():
        torch.testing.assert_close(value.mean(0), before[slot].mean(0), rtol=0, atol=1e-6)
        apart = (value - exact[slot]).abs().max()
        assert 0 < apart < most * before[slot].abs().max()


@pytest.mark.parametrize("method", ["fedex", "flora"])
@pytest.mark.parametrize("change", ["mixed", "local"])
def test_what_rounding_takes_off_a_product_goes_into_the_base(method, change):
    config = Config(**CONFIG.to_json() | {"method": method, "base_change": change, "wire": "int8"})
    job, generator, models = tiny_job(config), torch.Generator().manual_seed(0), []
    layout, state = job.backbone.layout, job.initial_stack().state
    W = neighbour_weights(build_schedule(config)(0))
    state |= {(VALUE, f): torch.randn(state[VALUE, f].shape, generator=generator) for f in (A, B)}
    for _ in range(3):
        products = joined(layout, values(state))
        sites = layout.by_site(dict(zip(((VALUE, A), (VALUE, B)), products, strict=True)))
        models.append(torch.cat([(b @ a).mean(0).flatten() for a, b in sites]))
        state |= mix(job, state, state, W, 0, range(4))
    for model in models[1:]:
        torch.testing.assert_close(model, models[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("how", ["average", "clipped-product:0.5"])
@pytest.mark.parametrize("wire", FEWER)
def test_clients_that_agree_stay_as_they_are(wire, how):
    """Or small steps would never get through."""
    before = {slot: value[:1].repeat(4, 1) for slot, value in states().items()}
    for slot, value in mixed(Config(**FEWER[wire].to_json() | {"mix": how}), before).items():
        assert torch.equal(value, before[slot])


def test_half_the_bytes_or_a_quarter_and_scales():
    whole, half, quarter = (tiny_job(one) for one in (CONFIG, *FEWER.values()))
    assert 2 * half.message_bytes(0, 1) == whole.message_bytes(0, 1)
    layout = quarter.backbone.layout
    parts = sum(len(layout.sizes(factor)) for _, factor in quarter.shared(0))
    assert quarter.message_bytes(0, 1) == whole.message_bytes(0, 1) // 4 + 2 * parts


# -- top-k


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-2, 2), min_size=1, max_size=12), st.data())
def test_the_farthest_are_those_of_a_stable_sort(values, data):
    count = data.draw(st.integers(1, len(values)))
    x = torch.tensor(values, dtype=torch.float32)
    expected = np.argsort(-np.abs(x.numpy()), kind="stable")[:count]
    assert farthest(x + 1, torch.ones(len(x)), count).nonzero()[:, 0].tolist() == sorted(expected)


@pytest.mark.parametrize("name", ["top-k", "top-k:0", "top-k:1.5", "top-k:nan", "top-k:a", "topk"])
def test_a_share_that_cant_be_is_refused_with_the_fix(name):
    with pytest.raises(ValueError, match=r"top-k:0\.01"):
        wire_type(name)


def test_at_least_one_value_travels():
    assert [wire_type("top-k:0.01").count(size) for size in (1, 10, 150, 1000)] == [1, 1, 2, 10]


def test_whoever_heard_the_last_message_gets_what_changed_and_others_all():
    config = Config(**CONFIG.to_json() | {
        "wire": "top-k:0.1", "topology": "pairs", "p": 0.5, "rounds": 6, "method": "rolora",
    })  # fmt: skip
    job = tiny_job(config)
    layout, weights = job.backbone.layout, [build_schedule(config)(t) for t in range(6)]
    some = 0
    for t, W in enumerate(weights):
        [(_, factor)] = job.shared(t)  # B and A travel by turns
        size, links = layout.size(factor), np.argwhere(neighbour_weights(W)).tolist()
        known = [t < 2 or weights[t - 2][i, j] > 0 for i, j in links]
        some += 0 < sum(known) < len(known)
        expected = sum(8 * round(0.1 * size) if one else 4 * size for one in known)
        assert job.sent_bytes(t, [(i, j, W[i, j]) for i, j in links]) == expected
    assert some, "both kinds were there in some round"
