"""HTTP to servers on this machine, ignoring the environment's proxies and certificates.

A proxy would reach its own loopback interface, not ours. And httpx fails for every request on many values that these
variables have in practice (`socks://…`, an IPv6 range in NO_PROXY, a missing certificate file).
"""

import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

_NO_PROXY = ("no_proxy", "NO_PROXY")  # the first takes precedence
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

_outside: str | None = None  # the original NO_PROXY while `direct` replaces it


def is_local(url: str) -> bool:
    """Whether the host is `localhost` or an address of this machine; other names are not looked up."""
    import httpx

    try:
        host = httpx.URL(url).host
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except (httpx.InvalidURL, ValueError):
        return False
    try:
        with socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return address.is_loopback  # ::1 may be missing in containers
    return True


def client(url: str, **options: Any) -> "httpx.Client":
    """A client for the server at `url`; the environment's proxies and certificates apply to other machines only."""
    import httpx

    return httpx.Client(base_url=url, trust_env=not is_local(url), **options)


def get(url: str, **options: Any) -> "httpx.Response":
    """`httpx.get` through `client`. Raises what httpx raises."""
    import httpx

    return httpx.get(url, trust_env=not is_local(url), **options)


def post(url: str, **options: Any) -> "httpx.Response":
    """`httpx.post` through `client`. Raises what httpx raises."""
    import httpx

    return httpx.post(url, trust_env=not is_local(url), **options)


def exempt() -> None:
    """Add loopback to NO_PROXY, for libraries that read it themselves (requests, urllib) and for child processes."""
    spared = [host for host in _no_proxy().split(",") if host]
    spared += [host for host in _LOOPBACK if host not in spared]
    os.environ.update(dict.fromkeys(_NO_PROXY, ",".join(spared)))


def proxies(url: str) -> dict[str, str]:
    """The environment's proxies for `url`, in the form of requests; within `direct`, the original ones."""
    from requests.utils import get_environ_proxies

    return dict(get_environ_proxies(url, no_proxy=_no_proxy() if _outside is None else _outside))


@contextmanager
def direct() -> Iterator[None]:
    """Hide proxies and certificate files from httpx-based libraries in this process, and from new children."""
    global _outside
    before = {name: os.environ.get(name) for name in (*_NO_PROXY, *_CERTIFICATES)}
    _outside = _no_proxy()
    os.environ.update(dict.fromkeys(_NO_PROXY, "*"))
    for name in _CERTIFICATES:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        _outside = None
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _no_proxy() -> str:
    return next(filter(None, map(os.environ.get, _NO_PROXY)), "")
