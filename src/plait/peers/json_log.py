"""What a peer or a relay says while it runs: lines of JSON on standard error."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import Counter

LOG = logging.getLogger("plait.peer")


def log_events(name: str) -> None:
    """A line of JSON on standard error for each thing that happens to a peer."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(name))
    LOG.handlers[:] = [handler]
    LOG.setLevel(logging.INFO)
    LOG.propagate = False


def log_to_stderr(name: str) -> None:
    """The same, and for what libraries say."""
    log_events(name)
    # What the libraries say, of themselves or of what a stranger sends them: JSON, and not much.
    root = logging.StreamHandler(sys.stderr)
    root.setFormatter(JsonLines(name))
    root.addFilter(Few())
    logging.getLogger().handlers[:] = [root]


class Few(logging.Filter):
    """The first lines of each place in the code, and no more: their number is others' doing."""

    MOST = 20

    def __init__(self) -> None:
        """Nothing has been said yet."""
        super().__init__()
        self._said: Counter[tuple[str, int]] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is one of the first of its place."""
        place = (record.pathname, record.lineno)
        self._said[place] += 1
        return self._said[place] <= self.MOST


class JsonLines(logging.Formatter):
    """A line of JSON for each record: time, level, message and what was given as `extra`."""

    EXTRA = ("round", "peer", "kind", "reason")

    def __init__(self, name: str) -> None:
        """Lines of the peer `name`."""
        super().__init__()
        self.name = name

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        extra = {key: getattr(record, key) for key in self.EXTRA if hasattr(record, key)}
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{when}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
        line |= {"self": self.name, "message": " ".join(record.getMessage().split()), **extra}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
