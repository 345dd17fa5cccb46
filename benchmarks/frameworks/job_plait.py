"""FedAvg by plait's engine: the clients stacked, everybody meets everybody."""

import json
import sys
import time
from pathlib import Path

import numpy as np
from client import job
from work import load, work_of

from plait.config import Config
from plait.engines.local_training import local_phase
from plait.factors import Factor
from plait.mixing import mean
from plait.model.backbone import Backbone
from plait.model.loading import Loaded


def main(folder: str) -> None:
    config = Config.from_json(json.loads((Path(folder) / "config.json").read_text()))
    tokens, model = load(config)
    work = work_of(model, tokens, config, config.clients)
    stack = work.stack()
    backbone = Backbone(Loaded(model, None, ()), config)
    begin, ends, losses = time.perf_counter(), [], []
    for round_ in range(config.rounds):
        found = local_phase(
            backbone, stack, Factor.AB, round_, tokens, work.shares, work.clients, config
        )
        for factor, value in stack.factors.items():
            value.copy_(mean(value).expand_as(value))
            stack.reset(factor)
        losses.append(float(np.mean(found)))
        ends.append(time.perf_counter())
    print(job(folder).result(ends, losses, begin))


if __name__ == "__main__":
    main(sys.argv[1])
