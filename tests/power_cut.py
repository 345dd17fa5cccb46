"""A disk that forgets what was not synced: the folders that a power cut may leave, at every moment.

Of a file its synced bytes are sure, of a folder its synced names; the rest may be there or not. Of
that the worst is kept after each step: nothing, all, the bytes or the names alone, and each changed
name by itself.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from plait.machine.files import LOCK

Image = frozenset[tuple[str, bytes]]
"""Path in the folder, content."""
Names = dict[str, dict[str, int]]
"""Folder -> name -> inode."""


class Disk:
    """What is on it for sure, and what a power cut may leave of `root`."""

    def __init__(self, root: Path, monkeypatch) -> None:
        root.mkdir()
        self.root = str(root)
        self.images: dict[Image, None] = {}
        self._synced: dict[int, bytes] = {}
        self._names: Names = {self.root: {}}
        self._open: dict[int, int] = {}  # an inode that is open is given to no other file
        for name in ("fsync", "replace", "rename"):
            monkeypatch.setattr(os, name, self._watched(getattr(os, name)))

    def leave(self, image: Image, folder: Path) -> None:
        """Make a folder of what was left."""
        for name, content in image:
            place = folder / name
            (place if name.endswith("/") else place.parent).mkdir(parents=True, exist_ok=True)
            if not name.endswith("/"):
                place.write_bytes(content)

    def _watched(self, original):
        def call(*args, **kwargs):
            self._cut()
            result = original(*args, **kwargs)
            if original.__name__ == "fsync":
                self._sync(args[0])
            self._cut()
            return result

        return call

    def _sync(self, descriptor: int) -> None:
        path, status = str(Path(f"/proc/self/fd/{descriptor}").readlink()), os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            self._names[path] = self._listed(path)
        else:
            self._synced[status.st_ino] = Path(path).read_bytes()

    def _cut(self) -> None:
        now = {folder: self._listed(folder) for folder, _, _ in os.walk(self.root)}
        for names in (now, *self._some_of(now)):
            for all_bytes in (False, True):
                self.images[frozenset(self._image(self.root, names, all_bytes))] = None

    def _some_of(self, now: Names) -> Iterator[Names]:
        """The names for sure, and with each one more."""
        yield self._names
        for folder, names in now.items():
            sure = self._names.get(folder, {})
            for name in names.keys() | sure.keys():
                if names.get(name) != sure.get(name) and name in names:
                    yield {**self._names, folder: {**sure, name: names[name]}}

    def _image(self, folder: str, names: Names, all_bytes: bool) -> Iterator[tuple[str, bytes]]:
        for name, inode in names.get(folder, {}).items():
            path = f"{folder}/{name}"
            place = os.path.relpath(path, self.root)
            if stat.S_ISDIR(os.fstat(self._open[inode]).st_mode):
                yield f"{place}/", b""
                yield from self._image(path, names, all_bytes)
            elif name != LOCK:
                now = self._bytes(self._open[inode]) if all_bytes else b""
                yield place, now if all_bytes else self._synced.get(inode, b"")

    def _listed(self, folder: str) -> dict[str, int]:
        names = {one.name: one.inode() for one in os.scandir(folder)}
        for name, inode in names.items():
            if inode not in self._open:
                self._open[inode] = os.open(f"{folder}/{name}", os.O_RDONLY)
        return names

    def _bytes(self, descriptor: int) -> bytes:
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0)

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
