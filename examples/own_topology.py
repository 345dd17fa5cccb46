"""A topology of one's own: a path, whose two ends meet only through everybody between them."""

import dataclasses

import numpy as np

import plait

# --8<-- [start:row]
from plait.topology import TOPOLOGIES, TopologyRow


def path(config):
    """A third for each neighbour, the rest for oneself: W is symmetric, its rows sum to 1."""
    beside = (np.eye(config.clients, k=1) + np.eye(config.clients, k=-1)) / 3
    W = beside + np.diag(1 - beside.sum(axis=1))
    return lambda round_: W


TOPOLOGIES["path"] = TopologyRow(path, "neighbours in a row", weighted=False)
# --8<-- [end:row]

config = dataclasses.replace(plait.build_preset("smoke"), topology="path", clients=4)
started, *_, last_evaluation = plait.Run(config)
print(f"rho {started.rho:.3f}: so much of the disagreement is left after a round")
print(f"accuracy {sum(last_evaluation.scores) / config.clients:.3f}")
