"""Messages of fewer bits: what they cost, and what they leave as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import tiny_job
from plait.config import Config
from plait.engines.steps import mix
from plait.mixing import neighbour_weights
from plait.topology import build_schedule
from plait.wire_types import OF_DTYPE, WIRE_TYPES

CONFIG = Config(clients=4, topology="ring", rounds=2, local_steps=1, batch_size=2, rank=2)
HALF = Config(**CONFIG.to_json() | {"wire": "bfloat16"})


@pytest.mark.parametrize("name", WIRE_TYPES)
def test_what_comes_out_is_what_was_rounded_and_twice_is_once(name):
    one = WIRE_TYPES[name]
    x = torch.tensor([0.0, -1.0, 1 / 3, 1e-30, 3e38, -7e-41, 12345.678])
    data = one.to_array(x).tobytes()
    assert len(data) == one.item_bytes * len(x)
    assert torch.equal(torch.from_numpy(one.from_bytes(data).copy()), one.rounded(x))
    assert torch.equal(one.rounded(one.rounded(x)), one.rounded(x))
    assert OF_DTYPE[one.dtype] is one


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


def test_the_mean_stays_and_each_is_nearly_what_it_would_be():
    before = states()
    after, exact = mixed(HALF, before), mixed(CONFIG, before)
    for slot, value in after.items():
        torch.testing.assert_close(value.mean(0), before[slot].mean(0), rtol=0, atol=1e-6)
        apart = (value - exact[slot]).abs().max()
        assert 0 < apart < 2**-8 * before[slot].abs().max()


@pytest.mark.parametrize("how", ["average", "clipped-product:0.5"])
def test_clients_that_agree_stay_as_they_are(how):
    """Or small steps would never get through."""
    before = {slot: value[:1].repeat(4, 1) for slot, value in states().items()}
    for slot, value in mixed(Config(**HALF.to_json() | {"mix": how}), before).items():
        assert torch.equal(value, before[slot])


def test_half_the_bytes():
    job, half = tiny_job(CONFIG), tiny_job(HALF)
    assert 2 * half.message_bytes(0, 1) == job.message_bytes(0, 1)
    assert np.isfinite(job.message_bytes(0, 1))
