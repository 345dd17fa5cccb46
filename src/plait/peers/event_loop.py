"""One background thread with an event loop, for all that a process does with gRPC.

gRPC's poller belongs to a process, not to a loop: two loops would wake each other for nothing.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from plait.machine.process_settings import configure_process

Result = TypeVar("Result")


class Background:
    """A thread that runs coroutines while anyone uses it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Start the thread for the first user."""
        with self._lock:
            self._users += 1
            if self._loop is None:
                configure_process()
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="plait-transport", daemon=True
                )
                self._thread.start()

    def release(self) -> None:
        """Stop the thread after the last user."""
        with self._lock:
            self._users -= 1
            if self._users or self._loop is None or self._thread is None:
                return
            self.run(self._loop.shutdown_default_executor()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._loop = self._thread = None

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Run a coroutine on the thread."""
        assert self._loop is not None, "start() comes first"
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)


BACKGROUND = Background()
