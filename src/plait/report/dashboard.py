"""The page of page.py, kept fresh: a server that follows run folders and tells the browser.

    GET /              the page, empty
    GET /plotly.js     the library that draws
    GET /events        server-sent events: `studies` (titles) and `study` (a payload) when changed

One task reads the folders (study.py) and one coroutine for each browser waits for it. Only
127.0.0.1 is served unless another host is asked for; then every request needs a random token, in
the address the first time and in a cookie after that.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from plait.report.page import Payload, payload, plotly_js, render
from plait.report.recorded_run import Track
from plait.report.study import Study, find_studies

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

LOG = logging.getLogger("plait.report")

LOOK_EVERY_S = 0.25
PING_S = 15.0
COOKIE = "plait_token"
LOOPBACK = ("127.0.0.1", "localhost")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


@dataclass
class Follower:
    """The studies in some folders, as they are now.

    Attributes:
        paths: Where to look.
        studies: Title -> what was found.
        version: Title -> how often it has changed.
        ends: Whether the server is about to stop; its streams then end.
    """

    paths: Sequence[Path]
    studies: dict[str, Study] = field(default_factory=dict)
    version: dict[str, int] = field(default_factory=dict)
    ends: Callable[[], bool] = bool
    _tracks: dict[Path, Track] = field(default_factory=dict)
    _seen: dict[str, tuple[object, ...]] = field(default_factory=dict)
    _made: dict[str, tuple[int, str]] = field(default_factory=dict)

    def look(self) -> None:
        """Read what is new in the folders."""
        # Folders that aren't there yet, or are just being made, come with the next look.
        with contextlib.suppress(ValueError, FileNotFoundError):
            found = find_studies(self.paths, self._tracks)
            for study in found:
                for _, track in study.tracks:
                    track.read()
            self.studies = _named(found)
        for title, study in self.studies.items():
            now = tuple((label, len(track.events), track.finished) for label, track in study.tracks)
            if self._seen.get(title) != now:
                self._seen[title] = now
                self.version[title] = self.version.get(title, 0) + 1

    @property
    def newest(self) -> str:
        """The title of the study that goes on; of several, or of none, the one that spoke last."""
        spoke = {
            title: (not study.finished, max(track.spoke_at for _, track in study.tracks))
            for title, study in self.studies.items()
        }
        return max(spoke, key=lambda title: spoke[title], default="")

    def payload(self, title: str) -> str:
        """The study's payload as JSON; made once for each version, however many look at it."""
        if self._made.get(title, (0, ""))[0] != self.version[title]:
            made: Payload = payload(self.studies[title]) | {"title": title}
            self._made[title] = (self.version[title], json.dumps(made))
        return self._made[title][1]


def _named(studies: Sequence[Study]) -> dict[str, Study]:
    """The studies by title; one whose title is taken gets a number."""
    named: dict[str, Study] = {}
    for study in studies:
        title, number = study.title, 2
        while title in named:
            title, number = f"{study.title} ({number})", number + 1
        named[title] = study
    return named


def serve(paths: Sequence[Path], host: str = "127.0.0.1", port: int = 8765) -> None:
    """Serve the dashboard until interrupted; prints its address.

    Args:
        paths: Run folders, comparisons' folders, or folders of such; they may still be empty.
        host: The address to listen at. Any other than the loopback's asks for a token.
        port: The port to listen at; 0 for any that is free.

    Raises:
        ValueError: starlette, uvicorn or jinja2 is not installed, or the port is taken.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ValueError("The dashboard needs uvicorn: pip install 'plait[report]'.") from error
    token = "" if host in LOOPBACK else secrets.token_urlsafe(24)
    follower = Follower(paths)
    config = uvicorn.Config(application(follower, token), host=host, port=port, log_level="warning")
    server = uvicorn.Server(config)
    follower.ends = lambda: server.should_exit
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ValueError(f"Can't listen on {host}:{port}: {error}. Take another --port.") from error
    shown = f"[{host}]" if ":" in host else host
    query = f"?token={token}" if token else ""
    print(f"http://{shown}:{sock.getsockname()[1]}/{query}", flush=True)
    server.run(sockets=[sock])


def application(follower: Follower, token: str = "") -> Starlette:
    """The dashboard as an ASGI application.

    Args:
        follower: What to show.
        token: What every request has to show; empty where only this machine is served.

    Raises:
        ValueError: starlette or jinja2 is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.responses import HTMLResponse, Response, StreamingResponse
        from starlette.routing import Route
    except ImportError as error:
        raise ValueError("The dashboard needs starlette: pip install 'plait[report]'.") from error
    page = render([], live=True)

    def guarded(
        answer: Callable[[Request], Awaitable[Response]],
    ) -> Callable[[Request], Awaitable[Response]]:
        async def checked(request: Request) -> Response:
            shown = request.query_params.get("token") or request.cookies.get(COOKIE, "")
            if token and not hmac.compare_digest(shown.encode(), token.encode()):
                return Response("Open the address that `plait dashboard` printed.\n", 403)
            response = await answer(request)
            response.headers.update(HEADERS)
            if token:
                response.set_cookie(COOKIE, token, httponly=True, samesite="strict")
            return response

        return checked

    async def index(_: Request) -> Response:
        return HTMLResponse(page)

    async def library(_: Request) -> Response:
        return Response(plotly_js(), media_type="text/javascript")

    async def said(request: Request) -> Response:
        stream = _stream(follower, request.query_params.get("study", ""), request)
        return StreamingResponse(stream, media_type="text/event-stream")

    @contextlib.asynccontextmanager
    async def following(_: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(_follow(follower))
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    # A page elsewhere that had its name resolve to this machine could read the events otherwise.
    own_names = [Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK)]
    return Starlette(
        routes=[
            Route("/", guarded(index)),
            Route("/plotly.js", guarded(library)),
            Route("/events", guarded(said)),
        ],
        middleware=[] if token else own_names,
        lifespan=following,
    )


async def _follow(follower: Follower) -> None:
    said = ""
    while True:
        try:
            await asyncio.to_thread(follower.look)
        except Exception as error:  # what is in a folder is anybody's; the page stays alive
            if repr(error) != said:
                said = repr(error)
                LOG.exception("what is in the folders can't be shown")
        await asyncio.sleep(LOOK_EVERY_S)


async def _stream(follower: Follower, title: str, request: Request) -> AsyncIterator[str]:
    titles: list[str] = []
    version, last = 0, time.monotonic()
    while not (follower.ends() or await request.is_disconnected()):
        if list(follower.studies) != titles:
            titles = list(follower.studies)
            yield _event("studies", json.dumps(titles))
        title = title if title in titles else follower.newest
        if title and follower.version[title] != version:
            version = follower.version[title]
            yield _event("study", await asyncio.to_thread(follower.payload, title))
            last = time.monotonic()
        if time.monotonic() - last > PING_S:
            # Tells a browser that is gone from one that waits.
            yield ": still here\n\n"
            last = time.monotonic()
        await asyncio.sleep(LOOK_EVERY_S / 2)


def _event(kind: str, data: str) -> str:
    return f"event: {kind}\ndata: {data}\n\n"
