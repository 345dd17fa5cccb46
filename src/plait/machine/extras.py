"""Packages that only some commands need: whether they are there is seen without importing them."""

from __future__ import annotations

from importlib.util import find_spec

PEER_PACKAGES = (
    "grpc", "grpc_health", "google.protobuf", "cryptography", "xxhash", "prometheus_client",
)  # fmt: skip
"""What a federation of peers needs."""


def installed(package: str) -> bool:
    """Whether a package could be imported.

    Example:
        >>> installed("json"), installed("jason")
        (True, False)
    """
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


def need(package: str, extra: str, what: str) -> None:
    """Refuse what needs a package that isn't there, before anything is computed.

    Args:
        package: As it is imported.
        extra: The extra of plait that brings it.
        what: What needs it, as a sentence begins.

    Raises:
        ValueError: It isn't installed; the message has the command that installs it.

    Example:
        >>> need("jason", "peer", "A peer")
        Traceback (most recent call last):
        ValueError: A peer needs the package jason: pip install 'plait[peer]'.
    """
    if not installed(package):
        raise ValueError(f"{what} needs the package {package}: pip install 'plait[{extra}]'.")
