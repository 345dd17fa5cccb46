"""FedAvg without a framework: a loop over the clients on one PEFT model."""

import sys
import time

import numpy as np
from client import job


def main(folder: str) -> None:
    work = job(folder)
    arrays = list(work.start.values())
    begin, ends, losses = time.perf_counter(), [], []
    for round_ in range(work.rounds):
        trained = [work.train(client, round_, arrays) for client in range(work.clients)]
        arrays = [np.mean(parts, axis=0) for parts in zip(*(a for a, _ in trained), strict=True)]
        losses.append(float(np.mean([loss for _, loss in trained])))
        ends.append(time.perf_counter())
    print(work.result(ends, losses, begin))


if __name__ == "__main__":
    main(sys.argv[1])
