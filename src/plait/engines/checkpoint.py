"""The state of every client in one file, written and read whole or a block of clients at a time.

Each slot is a tensor, such as `x.A`, with a row for each client, so a block of clients is a slice
of it: several workers write one file together, and whoever goes on from it may hold other blocks.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from plait.lora import Stack
from plait.machine.files import save_tensors


def save_stack(stack: Stack, path: Path, rounds_done: int, **beside: Tensor) -> None:
    """Write the state of all clients after so many rounds, and what is kept beside it.

    Raises:
        OSError: It can't be written; nothing is left of it.
    """
    save_tensors(_tensors(stack) | beside, path, _metadata(rounds_done))


def lay_out(stack: Stack, num_clients: int, path: Path, rounds_done: int) -> None:
    """Write such a file of so many clients without their rows: `write_rows` puts those in.

    Args:
        stack: The state of some of the clients.
        num_clients: How many the file is for.
        path: The file; safetensors' own format, a length, a header in JSON, and the tensors.
        rounds_done: Rounds behind the state.

    Raises:
        OSError: It can't be written.
    """
    header: dict[str, object] = {"__metadata__": _metadata(rounds_done)}
    end = 0
    for name, value in _tensors(stack).items():
        shape = [num_clients, *value.shape[1:]]
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_rows(stack: Stack, first: int, path: Path) -> None:
    """Put the rows of the clients from number `first` on into a file of `lay_out`.

    Raises:
        OSError: It can't be written.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for name, value in _tensors(stack).items():
            rows = value.cpu().contiguous().numpy()
            start = header[name]["data_offsets"][0] + first * (rows.nbytes // len(rows))
            file.seek(8 + size + start)
            file.write(rows.data)
        file.flush()
        os.fsync(file.fileno())


def load_rows(stack: Stack, path: Path, first: int = 0) -> None:
    """Bring a stack, which holds the clients from number `first` on, to what the file has of them.

    Raises:
        SafetensorError: The file can't be read.
    """
    with safe_open(path, "pt") as file:
        older = file.metadata()  # of an older plait: one number of steps for all clients
        for name, value in _tensors(stack).items():
            if name in older:
                value.fill_(int(older[name]))
            else:
                value.copy_(file.get_slice(name)[first : first + len(value)])


def load_beside(path: Path, name: str) -> Tensor | None:
    """What a checkpoint keeps beside the state; None without it, or without a checkpoint.

    Raises:
        SafetensorError: The file can't be read.
    """
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118


def rounds_done(path: Path) -> int:
    """The rounds behind a checkpoint; 0 where there is none.

    Raises:
        SafetensorError: The file can't be read.
    """
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        return int(file.metadata()["rounds_done"])


def _metadata(rounds_done: int) -> dict[str, str]:
    return {"rounds_done": str(rounds_done)}


def _tensors(stack: Stack) -> dict[str, Tensor]:
    """Name in the file -> float32, a row or a number for each client."""
    slots = {f"{kind}.{factor.name}": slot for (kind, factor), slot in stack.state.items()}
    return slots | {f"steps.{factor.name}": steps for factor, steps in stack.steps.items()}
