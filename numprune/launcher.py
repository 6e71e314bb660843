"""What a launcher like torchrun or accelerate launch says about the processes that it has started."""

import os


def count() -> int:
    """Return the number of processes; 1 without a launcher."""
    return _number("WORLD_SIZE", 1)


def index() -> int:
    """Return the index of this process, from 0; 0 without a launcher."""
    return _number("RANK", 0) if count() > 1 else 0


def _number(variable: str, alone: int) -> int:
    value = os.environ.get(variable, "")
    return int(value) if "RANK" in os.environ and value.isdecimal() else alone
