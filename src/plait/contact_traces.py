"""Reading who meets whom from a file: an edge list, or a contact trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from plait.machine.text_files import read_text
from plait.mixing_matrix import Adjacency


def read_contacts(path: Path, N: int) -> npt.NDArray[np.int64]:
    """(M, 2) edges `i j` or (M, 3) contacts `round i j`; `#` starts a comment."""
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot read edges_file {path}: {error}") from error
    fields = [line.split("#")[0].replace(",", " ").split() for line in lines]
    numbered = [(number, row) for number, row in enumerate(fields, start=1) if row]
    if not numbered:
        raise ValueError(f"{path} has no edges; write `i j` or `round i j` on each line.")
    width = len(numbered[0][1])
    return np.array([_contact(row, width, N, f"{path}, line {n}") for n, row in numbered])


def _contact(fields: list[str], width: int, N: int, place: str) -> list[int]:
    """One line as integers, or a `ValueError` that says where it is and what is wrong with it."""
    if width not in (2, 3) or len(fields) != width or not all(map(str.isdecimal, fields)):
        raise ValueError(
            f"{place}: {' '.join(fields)!r} is neither `i j` (an edge list) nor `round i j` "
            "(a contact trace) in whole numbers from 0; all lines must be of one kind."
        )
    row = [int(field) for field in fields]
    if max(row[-2:]) >= N:
        raise ValueError(
            f"{place}: there is no client {max(row[-2:])}; the {N} clients are numbered from 0 to "
            f"{N - 1}. Raise clients or correct the line."
        )
    if row[-2] == row[-1]:
        raise ValueError(f"{place}: client {row[-1]} meets itself; remove the line.")
    return row


def from_edges(edges: npt.NDArray[np.int64], N: int) -> Adjacency:
    """Edges (M, 2) -> adjacency (N, N)."""
    adjacency = np.zeros((N, N), dtype=np.bool_)
    adjacency[edges[:, 0], edges[:, 1]] = adjacency[edges[:, 1], edges[:, 0]] = True
    return adjacency
