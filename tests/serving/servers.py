"""Small HTTP servers: one that gives fixed answers, and one that keeps MLflow's artifacts in a folder."""

import json
import threading
from collections.abc import Iterator, Mapping
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
