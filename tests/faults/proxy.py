"""A link that can be cut: a TCP proxy on this machine."""

from __future__ import annotations

import contextlib
import socket
import threading


class Proxy:
    """Passes bytes on to an address until it is cut."""

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._whole = threading.Event()
        self._whole.set()
        self._open: list[socket.socket] = []

    def __enter__(self) -> Proxy:
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.cut()
        _shut(self._listener)  # wakes the thread that accepts; closing alone would not
        self._listener.close()
        self._thread.join()

    def cut(self) -> None:
        """Break what is open; what is tried is closed at once."""
        self._whole.clear()
        while self._open:
            _shut(self._open.pop())

    def heal(self) -> None:
        self._whole.set()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            if not self._whole.is_set():
                return
            with contextlib.suppress(OSError), socket.create_connection(self._target) as server:
                self._open += [client, server]
                back = threading.Thread(target=_pass_on, args=(server, client), daemon=True)
                back.start()
                _pass_on(client, server)
                back.join()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    _shut(source)
    _shut(sink)


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
