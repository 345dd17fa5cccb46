"""Peers: real processes that train together over gRPC with mutual TLS."""

import os

# gRPC's own lines are no JSON, and a stranger makes it write as many as it likes. It reads this
# when it is loaded, which is after here; whoever looks for a fault in it sets another value.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
