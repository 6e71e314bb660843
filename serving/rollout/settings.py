"""Settings for servers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from numprune.serving.vllm import server
from numprune.serving.vllm.environment import Environment

PORT = 8000


@dataclass(frozen=True)
class Settings:
    """None keeps the current value or, if nothing runs yet, means 127.0.0.1, port 8000, the weights' precision, no
    options.

    Attributes:
        host, port: of the router, the address that clients use.
        dtype: "auto" or a precision of `reference_answers.TOLERANCES`.
        options: for vLLM. Two servers run side by side during a switch: on a GPU they share its memory.
        api_key: that clients must send. It is not stored: None means no key, and is refused if the model was served
            with one.
        drain_timeout_s: limit for requests still running on the old server.
    """

    environment: Environment
    host: str | None = None
    port: int | None = None
    dtype: str | None = None
    options: Sequence[str] | None = None
    api_key: str | None = field(default=None, repr=False)
    startup_timeout_s: float = server.STARTUP_S
    drain_timeout_s: float = 300.0
