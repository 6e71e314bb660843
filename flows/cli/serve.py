"""numprune serve: serves a release with vLLM."""

import argparse
import logging
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from numprune.errors import InputError
from numprune.flows.cli.parser import MODEL_REFERENCE, Answer, Parser, Subcommands, add_registry, at_least, command
from numprune.serving.vllm import api_key, options

if TYPE_CHECKING:
    from numprune.serving.vllm.server import Server

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")  # those that serving.reference_answers can check
_WATCH_S = 0.5

# vLLM options that numprune sets itself.
_OURS = {
    **{name: f"give {name} before the --" for name in ("--host", "--port", "--dtype")},
    "--model": "the release determines the model",
    "--uds": "the server must listen on --host and --port, so that it can be checked",
    "--api-key": f"other users could see it; set ${api_key.VARIABLE} or give {api_key.OPTION} before the --",
}


def add(commands: Subcommands) -> None:
    parser = command(
        commands,
        "serve",
        run,
        "serve a release with vLLM, after checking its files and its answers",
        "numprune serve my-model@production --port 8000 -- --gpu-memory-utilization 0.5",
    )
    parser.add_argument("reference", metavar="REFERENCE", help=MODEL_REFERENCE)
    parser.add_argument("--port", type=at_least(1), default=8000, metavar="P", help="port to listen on (default: 8000)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add_server_options(parser, dtype="auto")


def add_server_options(parser: Parser, dtype: str | None) -> None:
    """Add the options shared by all commands that start servers."""
    parser.add_argument(
        "--vllm", metavar="ENV", help="virtual environment with vLLM (default: $NUMPRUNE_VLLM, then .venv-vllm)"
    )
    parser.add_argument(
        "--untested-vllm",
        action="store_true",
        help="accept a version that numprune was not tested with (default: refuse it)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=dtype,
        metavar="DTYPE",
        help=f"compute precision: {', '.join(DTYPES)} "
        f"(default: {'auto' if dtype else 'unchanged, or auto'}, the weights' precision)",
    )
    parser.add_argument(
        "--max-model-len",
        type=at_least(1),
        metavar="N",
        help="maximum sequence length in tokens (default: the model's context)",
    )
    parser.add_argument(
        api_key.OPTION,
        type=Path,
        metavar="FILE",
        help=f"file with the API key that clients must send (default: ${api_key.VARIABLE}, if set)",
    )
    parser.add_argument(
        "--startup-timeout",
        type=at_least(1),
        default=600,
        metavar="S",
        help="seconds for vLLM to start (default: 600)",
    )
    add_registry(parser)
    parser.usage = f"{parser.format_usage().removeprefix('usage: ').rstrip()} [-- VLLM OPTIONS]"


def vllm_options(args: argparse.Namespace) -> list[str]:
    """The options for vLLM. Raises InputError for reserved options."""
    for word in args.vllm_options or []:
        option = options.taken(word, _OURS)
        if option is not None:
            raise InputError(f"-- {word.partition('=')[0]}: {_OURS[option]}")
    length = ["--max-model-len", str(args.max_model_len)] if args.max_model_len else []
    return [*length, *(args.vllm_options or [])]


def run(args: argparse.Namespace) -> Answer:
    from numprune.flows import children, stages
    from numprune.flows.steps import deploy
    from numprune.serving import deployment
    from numprune.serving.vllm import environment, server

    started = time.perf_counter()
    vllm = environment.find(args.vllm, untested=args.untested_vllm)
    passed_on, key = vllm_options(args), api_key.read(args.api_key_file)
    server.require_free(args.host, args.port)  # before the download
    workspace = stages.workspace_folder(args.workspace)
    release = children.call(deploy.prepare, workspace, args.uri, args.reference)
    dtype = deployment.choose_dtype(release, args.dtype)
    log = deployment.log_file(workspace, f"serve-{release.name}")
    with ExitStack() as stack:
        running = stack.enter_context(
            server.serving(
                vllm,
                release.checkpoint,
                name=release.name,
                host=args.host,
                port=args.port,
                dtype=dtype,
                options=passed_on,
                api_key=key,
                log=log,
                startup_timeout_s=args.startup_timeout,
            )
        )
        found = deployment.prove(running, release, dtype)
        proved = stack.pop_all()  # otherwise leaving the block ends the server
    data = {
        "reference": release.reference,
        "name": running.name,
        "version": release.version,
        "digest": release.digest,
        "url": running.url,
        "pid": running.pid,
        "dtype": dtype,
        "vllm": vllm.version,
        "log": str(log),
        "server_check": found,
        "seconds": round(time.perf_counter() - started, 3),
    }
    return Answer(data, ready(release.reference, running.url, running.name), then=partial(_serve, proved, running))


def ready(reference: str, url: str, name: str) -> str:
    """What is printed once a server may take traffic."""
    return f"ready: {reference} at {url}/v1, model {name!r}; Ctrl-C stops it"


def _serve(stack: ExitStack, running: "Server") -> int:
    """Serve until a signal arrives. Raises ServerError if vLLM ends by itself."""
    with stack:
        try:
            while True:
                running.require_alive()
                time.sleep(_WATCH_S)
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM
            logger.info("%s: stopping", running.name)
    return 0
