"""Small HTTP servers: with fixed answers, with computed ones, and one that stores MLflow's artifacts."""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def content(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))


@contextmanager
def _listening(handler: type[_Handler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def answering(answers: Mapping[str, tuple[int, str]]) -> Iterator[str]:
    """A server that answers each path with a status and a text, and 404 elsewhere; its address."""

    class Handler(_Handler):
        def do_GET(self) -> None:
            self.content()
            status, text = answers.get(urlsplit(self.path).path, (404, "Not Found"))
            self.answer(status, text.encode())

        do_POST = do_GET  # noqa: N815

    with _listening(Handler) as address:
        yield address


@contextmanager
def computing(answer: Callable[[str, Any], Any]) -> Iterator[str]:
    """A server that answers with the JSON of `answer(path, body)`; its address."""

    class Handler(_Handler):
        def do_GET(self) -> None:
            body = json.loads(self.content() or "null")
            self.answer(200, json.dumps(answer(self.path, body)).encode())

        do_POST = do_GET  # noqa: N815

    with _listening(Handler) as address:
        yield address


@contextmanager
def storing(folder: Path) -> Iterator[str]:
    """The part of an MLflow server that keeps artifacts, with files in `folder`; the address for artifacts."""
    root = "/api/2.0/mlflow-artifacts/artifacts"

    class Handler(_Handler):
        def do_PUT(self) -> None:
            path = self.file()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.content())
            self.answer(200, b"{}")

        def do_GET(self) -> None:
            listed = parse_qs(urlsplit(self.path).query).get("path")
            if listed:
                path = folder / listed[0]
                found = sorted(path.iterdir()) if path.is_dir() else []
                files = [{"path": one.name, "is_dir": one.is_dir(), "file_size": one.stat().st_size} for one in found]
                self.answer(200, json.dumps({"files": files}).encode())
            elif self.file().is_file():
                self.answer(200, self.file().read_bytes())
            else:
                self.answer(404)

        def file(self) -> Path:
            return folder / unquote(urlsplit(self.path).path).removeprefix(f"{root}/")

    with _listening(Handler) as address:
        yield f"{address}{root}"


class Hub:
    """The part of the Hugging Face hub's API that uploads use, without Xet: repositories, LFS objects, commits.

    Attributes:
        repositories: name -> path -> content, as committed.
        private: those that were made private.
        token: that requests must carry.
    """

    def __init__(self, token: str) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.token = token
        self._objects: dict[str, bytes] = {}

    @contextmanager
    def listening(self) -> Iterator[str]:
        """Its address."""
        hub = self

        class Handler(_Handler):
            def do_POST(self) -> None:
                content = self.content()
                if self.headers.get("Authorization") != f"Bearer {hub.token}":
                    self.answer(401, b'{"error": "Invalid username or password."}')
                    return
                status, answer = hub._post(urlsplit(self.path).path, content, f"http://{self.headers['Host']}")
                self.answer(status, json.dumps(answer).encode())

            def do_PUT(self) -> None:
                hub._objects[self.path.rpartition("/")[2]] = self.content()
                self.answer(200)

        with _listening(Handler) as address:
            yield address

    def _post(self, path: str, content: bytes, address: str) -> tuple[int, dict[str, Any]]:
        if path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{address}/{name}"}
            self.repositories[name] = {}
            self.private |= {name} if asked.get("visibility") == "private" or asked.get("private") else set()
            return 200, {"url": f"{address}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"objects": [self._lfs(found, address) for found in json.loads(content)["objects"]]}
        _, _, _, owner, model, what, _branch = path.split("/")
        if what == "preupload":
            files = json.loads(content)["files"]
            modes = {True: "lfs", False: "regular"}
            return 200, {
                "files": [
                    {"path": file["path"], "uploadMode": modes[file["size"] > 10_000], "shouldIgnore": False}
                    for file in files
                ]
            }
        return self._commit(f"{owner}/{model}", content, address)

    def _lfs(self, found: dict[str, Any], address: str) -> dict[str, Any]:
        return {**found, "actions": {"upload": {"href": f"{address}/objects/{found['oid']}", "header": {}}}}

    def _commit(self, name: str, content: bytes, address: str) -> tuple[int, dict[str, Any]]:
        files = dict(self.repositories[name])
        for line in content.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                stored = self._objects[value["oid"]]
                if hashlib.sha256(stored).hexdigest() != value["oid"]:
                    return 400, {"error": f"{value['path']}: not what was uploaded"}
                files[value["path"]] = stored
        self.repositories[name] = files
        commit = hashlib.sha1(content).hexdigest()
        return 200, {"commitUrl": f"{address}/{name}/commit/{commit}", "commitOid": commit, "success": True}
