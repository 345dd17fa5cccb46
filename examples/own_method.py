"""A method of one's own: FedSA-LoRA, where both factors train and only A travels (2410.01463)."""

import dataclasses

import plait

# --8<-- [start:row]
from plait.methods import AB, METHODS, A, Method, always

METHODS["fedsa"] = lambda _config: Method(
    summary="FedSA-LoRA: both train, only A is mixed; B stays at its client",
    train=always(AB),
    share=always(A),
)
# --8<-- [end:row]

config = dataclasses.replace(plait.build_preset("smoke"), method="fedsa")
*_, last_round, last_evaluation = plait.Run(config)
print(f"{last_round.shared} travelled, {last_round.sent_bytes} bytes in the last round")
print(f"accuracy {sum(last_evaluation.scores) / config.clients:.3f}")
