"""The server, and what every request goes through: who asks, whether to fail, and errors as the client knows them."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

from .repositories import Commit, Repository


ROUTES: list[tuple[str, re.Pattern, Callable]] = []


def route(method: str, path: str) -> Callable:
    """Adds a function to the routes. It gets the groups of the path and returns what the answer is in JSON."""

    def add(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(path), function))
        return function

    return add


def address(kind: str | None, name: str) -> str:
    """A repository's address on the server, and its key in `LocalHub.repositories`."""
    return f"datasets/{name}" if (kind or "").startswith("dataset") else name


class Refusal(Exception):
    """An answer that says no. `code` is what the client chooses its exception by."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any):
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class LocalHub:
    """The server, as a context manager.

    Args:
        users: Names by access token. A user owns the repositories under this name and sees no private ones of others.

    Attributes:
        repositories: By address, `"user/name"` or `"datasets/user/name"`.
        requests: Routes that were asked for, such as `"upload"` or `"commit"`, in order.
    """

    def __init__(self, users: dict[str, str] | None = None):
        self.users = {"hf_user": "user", "hf_other": "other"} if users is None else users
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.failures: dict[str, list[int | None]] = {}
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """All environment variables of a process that takes this server for the Hub.

        Args:
            home: Folder for its cache.
            token: Access token, a key of `users`; None for somebody who has not logged in.
        """
        inherited = {name: value for name, value in os.environ.items() if not re.match("HF_|HUGGING|TRANSF", name)}
        return inherited | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": token or "",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # another protocol, which the client prefers for large files
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }

    @contextmanager
    def client(self, home: Path, token: str | None = None) -> Iterator[Callable[..., Any]]:
        """A process with that environment, and a function that calls others in it: `call(function, *arguments)`.

        Functions are those of a module; arguments, results and errors travel pickled, which errors of the client's own
        do not survive.
        """
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            with mock.patch.dict(os.environ, self.environment(home, token), clear=True):
                pool.submit(int).result()  # starts it
            yield lambda function, *arguments, **options: pool.submit(function, *arguments, **options).result()

    def fail(self, route: str, status: int | None = 403, times: int = 1, after: int = 0) -> None:
        """Makes requests to a route fail.

        The client tries 5xx and cut connections again five times, after 1, 2, 4, 8 and 8 seconds. It does not try
        other errors again, nor commits.

        Args:
            route: Name of a function of `local_hub.routes`.
            status: HTTP status of the answer. None cuts the connection: a request in the middle of its body, which is
                then without effect, a download in the middle of the file.
            times: Number of requests that fail.
            after: Number of requests before them that do not.
        """
        if route not in {function.__name__ for *_, function in ROUTES}:
            raise KeyError(route)
        self.failures[route] = [200] * after + [status] * times


class Handler(BaseHTTPRequestHandler):
    """One connection. Functions of `local_hub.routes` get it to ask for what they need."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def hub(self) -> LocalHub:
        return self.server.hub

    def log_message(self, *_) -> None:
        """Tests are quiet."""

    def answer(self) -> None:
        parts = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        method = "GET" if self.command == "HEAD" else self.command
        fitting = ((f, match) for m, path, f in ROUTES if m == method and (match := path.fullmatch(parts.path)))
        function, match = next(fitting, (None, None))
        name = function.__name__ if function else parts.path
        with self.hub.lock:
            self.hub.requests.append(name)
            status = self.hub.failures[name].pop(0) if self.hub.failures.get(name) else 200
        self.is_cut = status is None
        if self.is_cut and method != "GET":
            self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
            self.close_connection = True
            return
        self.body = self.read_body()
        try:
            if status not in (None, 200):
                raise Refusal(status, "told to fail")
            if function is None:
                raise Refusal(404, "no such address")
            with self.hub.lock:
                answer = function(self, *(unquote(group or "") for group in match.groups()))
            if answer is not None:
                self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        except Refusal as refusal:
            headers = {"Content-Type": "application/json", **refusal.headers}
            self.send(refusal.status, json.dumps(refusal.body).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, status: int, body: bytes, headers: dict) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": len(body)}).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.is_cut:
            body, self.close_connection = body[: len(body) // 2], True
        if self.command != "HEAD":
            self.wfile.write(body)

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def writer(self, owner: str | None = None) -> str:
        """Name of the user, who has to be the owner."""
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if owner not in (None, user):
            raise Refusal(403, f"You don't have the rights to change anything under {owner}")
        return user

    def repository(self, kind: str | None, name: str, write: bool = False) -> Repository:
        """The repository; one that the user may not see is as good as none."""
        user, owner = self.user(), name.split("/")[0]
        found = self.hub.repositories.get(address(kind, name))
        if found is None or (found.private and user != owner):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write:
            self.writer(owner)
        return found

    def commit(self, kind: str, name: str, revision: str, write: bool = False) -> tuple[Repository, Commit]:
        repository = self.repository(kind, name, write)
        commit = repository.find(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository, commit
