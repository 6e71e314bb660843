"""numprune check-server: checks a running server against the reference answers of its release."""

import argparse
import logging
import signal
import time
from pathlib import Path

from numprune.errors import NumpruneError
from numprune.flows.cli.parser import Answer, Subcommands, add_choice, at_least, command
from numprune.flows.cli.serve import DTYPES
from numprune.serving.vllm import api_key

logger = logging.getLogger(__name__)

_POLL_S = 2.0


def add(commands: Subcommands) -> None:
    parser = command(
        commands,
        "check-server",
        check_server,
        "check a running server against the reference answers of its release",
        "numprune check-server ./release --url http://127.0.0.1:8000 --dtype bfloat16",
    )
    parser.add_argument("release", metavar="RELEASE", type=Path, help="a release folder")
    parser.add_argument("--url", required=True, help="address of the server, without /v1")
    add_choice(
        parser, "--dtype", [dtype for dtype in DTYPES if dtype != "auto"], "bfloat16", "precision in which it computes"
    )
    parser.add_argument(
        "--startup-timeout",
        type=at_least(0),
        default=0,
        metavar="S",
        help="seconds to wait until it is healthy (default: 0)",
    )
    parser.add_argument(
        api_key.OPTION,
        type=Path,
        metavar="FILE",
        help="file with the server's API key (default: $VLLM_API_KEY, if set)",
    )
    parser.add_argument(
        "--marker",
        type=Path,
        metavar="FILE",
        help="write this file after a pass, then wait for SIGTERM (default: none)",
    )


def check_server(args: argparse.Namespace) -> Answer:
    from numprune.serving import reference_answers

    key = api_key.read(args.api_key_file)
    reference = reference_answers.read(args.release)
    if args.marker:
        args.marker.unlink(missing_ok=True)  # left by an earlier server
    _wait(args.url, key, args.startup_timeout)
    found = reference_answers.check(args.url, reference, args.dtype, key)
    text = f"{args.url}: passed in {found['dtype']}, {reference_answers.told(found)}"
    if args.marker:
        logger.info("%s", text)
        args.marker.touch()
        signal.pause()
    return Answer(found, text)


def _wait(url: str, key: str | None, timeout_s: float) -> None:
    """Wait until /health succeeds. Raises NumpruneError on timeout."""
    import httpx

    from numprune.serving import loopback

    deadline = time.monotonic() + timeout_s
    while True:
        try:
            said = str(loopback.get(f"{url}/health", headers=api_key.headers(key), timeout=5.0).status_code)
            if said == str(httpx.codes.OK.value):
                return
        except httpx.HTTPError as error:
            said = str(error) or type(error).__name__
        except httpx.InvalidURL as error:
            raise NumpruneError(f"--url {url!r}: {error}") from None
        if time.monotonic() >= deadline:
            raise NumpruneError(f"{url}: not healthy after {timeout_s:g} s ({said})")
        time.sleep(_POLL_S)
