"""Files that are there whole or not at all: written beside their place, flushed, then renamed.

A power cut takes what was not synced, of a file its bytes and of a folder its names, and leaves the
rest in any order. So what another file relies on is synced before that one gets its name.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    from torch import Tensor

LOCK, PARTIAL = ".lock", ".partial"


def write_atomically(path: Path, text: str) -> None:
    """Write a text file.

    Raises:
        OSError: It can't be written; nothing is left of it.
    """
    atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file that plait wrote.

    Raises:
        ValueError: It isn't one any more; the message has the file.
        OSError: It can't be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise damaged(path, error) from error
    if not isinstance(found, dict):
        raise damaged(path, "it holds no object")
    return found


def damaged(path: Path, why: object) -> ValueError:
    """What to raise of a file that plait wrote, and that isn't any more what it was."""
    return ValueError(f"{path} is damaged ({why}); put it back as it was.")


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: It can't be written; nothing is left of it.
    """
    from safetensors.torch import save_file  # which imports torch

    def save(partial: Path) -> None:
        partial.touch()
        mode = partial.stat().st_mode  # the umask's; the library's own file is its writer's alone
        try:
            save_file(tensors, partial, metadata=metadata)
            partial.chmod(mode)
        except SafetensorError as error:  # a full disk, mostly
            raise OSError(f"{path} can't be written: {error}") from error

    atomically(path, save)


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk itself, where no power cut takes them.

    Raises:
        OSError: It isn't there, or the disk can't take it.
    """
    if sys.platform == "win32" and path.is_dir():  # which can't open one
        return
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Have all that is in a folder on the disk, whatever wrote it."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def make_lasting(folder: Path) -> None:
    """Make a folder, and those above it, that a power cut does not take; it may be there."""
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in new:
        sync(one.parent)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes from writing into a folder while this lasts.

    Raises:
        ValueError: One does already.
        OSError: It can't be written.
    """
    if sys.platform == "win32":  # which has other locks
        yield
        return
    import fcntl

    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # else a file system without locks
            os.close(descriptor)
            raise ValueError(
                f"Another process is writing into {folder}, perhaps the same run, or a notebook "
                "that left its loop: end that one first."
            ) from error
    try:
        yield
    finally:
        os.close(descriptor)


def check_new(folder: Path) -> None:
    """That a run may begin in a folder.

    Raises:
        ValueError: It holds a run, or something else.
    """
    if (folder / "config.json").exists():
        raise ValueError(
            f"{folder} already holds a run; take another --out, or --resume to go on with it."
        )
    # A run that died while it began has left nothing, or a file that never got its name.
    kept = folder.is_dir() and [
        x for x in folder.iterdir() if x.name != LOCK and x.suffix != PARTIAL
    ]
    if folder.exists() and (not folder.is_dir() or kept):
        raise ValueError(f"{folder} is not an empty folder; take another --out.")


def make_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Make a folder with all its files, unless another process is first.

    Raises:
        OSError: It can't be written; nothing is left of it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        fill(partial)
        partial.rename(folder)
    except OSError:
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have a file written beside its place, and put there when it is whole.

    Raises:
        OSError: It can't be written; nothing is left of it.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        write(partial)
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
