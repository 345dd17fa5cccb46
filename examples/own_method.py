"""A method of one's own: both factors train, and only B travels."""

import dataclasses

import plait

# --8<-- [start:row]
from plait.methods import AB, METHODS, B, Method, always

METHODS["share-b"] = lambda _config: Method(
    summary="Both train, only B is mixed; A stays at its client",
    train=always(AB),
    share=always(B),
)
# --8<-- [end:row]

config = dataclasses.replace(plait.build_preset("smoke"), method="share-b")
*_, last_round, last_evaluation = plait.Run(config)
print(f"{last_round.shared} travelled, {last_round.sent_bytes} bytes in the last round")
print(f"accuracy {sum(last_evaluation.scores) / config.clients:.3f}")
