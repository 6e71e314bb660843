"""Requests to this machine despite proxy variables."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import getproxies, proxy_bypass

import httpx
import pytest
import requests

from numprune.serving import loopback

# What stands in environments, and what httpx makes of it, wherever a request goes.
VARIABLES = [
    {"HTTP_PROXY": "http://127.0.0.1:9"},  # nobody listens there
    {"all_proxy": "socks://proxy:1080"},  # as GNOME sets it; no such scheme
    {"ALL_PROXY": "socks5://proxy:1080"},  # socksio is not installed
    {"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "10.0.0.0/8,fd00::/8"},  # "Invalid port"
    {"SSL_CERT_FILE": "/no/such/file.pem"},
]


@pytest.fixture
def url() -> Iterator[str]:
    """A server that answers 200 to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(params=VARIABLES, ids=lambda variables: ",".join(variables))
def variables(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in request.param.items():
        monkeypatch.setenv(name, value)
    return dict(request.param)


def test_requests_to_this_machine_bypass_proxies(variables: dict[str, str], url: str) -> None:
    with pytest.raises(Exception) as refused:
        httpx.get(url, timeout=5.0)
    assert isinstance(refused.value, httpx.TransportError | httpx.InvalidURL | ValueError | ImportError | OSError)
    assert loopback.get(url, timeout=60.0).is_success
    assert loopback.post(url, json={}, timeout=60.0).is_success
    with loopback.client(url, timeout=60.0) as client:
        assert client.get("/health").is_success


def test_libraries_bypass_proxies_for_this_machine(
    variables: dict[str, str], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    before = dict(os.environ)
    with loopback.direct():
        assert httpx.get(url, timeout=60.0).is_success
    assert dict(os.environ) == before
    loopback.exempt()
    assert requests.get(url, timeout=60.0).ok
    for host in ("127.0.0.1:80", "localhost", "::1"):
        assert proxy_bypass(host)
    assert [name for name in variables if name.lower() == "no_proxy" and "10.0.0.0/8" not in os.environ[name]] == []
    once = os.environ["NO_PROXY"]
    loopback.exempt()
    assert os.environ["NO_PROXY"] == once
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name)


def test_other_hosts_keep_their_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "inside.example")
    for within in (False, True):
        if within:
            direct = loopback.direct()
            direct.__enter__()
            assert proxy_bypass("collector.example")
        assert loopback.proxies("https://collector.example/v1/traces")["https"] == getproxies()["https"]
        assert loopback.proxies("https://inside.example/v1/traces") == {}
    direct.__exit__(None, None, None)
    assert not loopback.is_local("https://collector.example")


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://127.8.9.10", True),
        ("http://localhost:4200/api", True),
        ("http://[::1]:8000/v1", True),
        ("http://0.0.0.0:8000", True),
        ("http://192.0.2.1:8000", False),  # for documentation: nobody's
        ("http://[2001:db8::1]", False),
        ("http://localhost.example", False),
        ("https://registry.example:5000", False),
        ("http://[::1", False),
        ("", False),
    ],
)
def test_addresses_of_this_machine(url: str, local: bool) -> None:
    assert loopback.is_local(url) is local
