"""Flower's simulation of the job: FedAvg over all clients, one CPU for each that trains at once."""

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
# Ray's workers are processes of their own, and have to find client.py.
os.environ["PYTHONPATH"] = str(Path(__file__).parent)

from client import job
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

client_app, server_app = ClientApp(), ServerApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    config = message.content["config"]
    work = job(config["folder"])
    arrays, loss = work.train(
        context.node_config["partition-id"],
        config["server-round"] - 1,
        message.content["arrays"].to_numpy_ndarrays(),
    )
    content = RecordDict({
        "arrays": ArrayRecord(arrays),
        "metrics": MetricRecord({"loss": loss, "num-examples": 1}),
    })  # fmt: skip
    return Message(content=content, reply_to=message)


class Timed(FedAvg):
    """FedAvg that notes when each round ends, and its mean loss."""

    ends: list[float]
    losses: list[float]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]):  # type: ignore[no-untyped-def]
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.ends.append(time.perf_counter())
        self.losses.append(metrics["loss"])
        return arrays, metrics


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    folder = sys.argv[1]
    work = job(folder)
    strategy = Timed(fraction_evaluate=0.0, min_train_nodes=work.clients,
                     min_available_nodes=work.clients)  # fmt: skip
    strategy.ends, strategy.losses = [], []
    begin = time.perf_counter()
    strategy.start(
        grid,
        ArrayRecord(list(work.start.values())),
        num_rounds=work.rounds,
        train_config=ConfigRecord({"folder": folder}),
    )
    print(work.result(strategy.ends, strategy.losses, begin), flush=True)


if __name__ == "__main__":
    run_simulation(
        server_app,
        client_app,
        num_supernodes=job(sys.argv[1]).clients,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
