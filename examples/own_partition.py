"""A partition of one's own: clients whose numbers of rows halve from one to the next."""

import dataclasses

import numpy as np

import plait

# --8<-- [start:row]
from plait.data.partition import PARTITIONS, PartitionRow
from plait.rng import stream


def halving(deal):
    """Half of all rows for the first client, half of the rest for the second, and so on."""
    order = stream(deal.config.seed, "halving").permutation(len(deal.rows))
    ends = [len(order) - len(order) // 2**i for i in range(1, deal.config.clients)]
    return np.split(order, ends)


PARTITIONS["halving"] = PartitionRow(halving, "Each client has half of the one before")
# --8<-- [end:row]

config = dataclasses.replace(plait.build_preset("smoke"), label_skew="halving", clients=4)
started, *_ = plait.Run(config)
for client, counts in enumerate(started.label_counts):
    print(f"client {client}: {sum(counts)} rows, by label {counts}")
