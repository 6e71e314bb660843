"""What strangers write, as hypothesis makes it up: the same in every run, so that a failure is one for everybody.

`NUMPRUNE_FUZZ=5000 pytest tests/fuzz` looks for more, elsewhere each time.
"""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "fuzz",
    max_examples=int(os.environ.get("NUMPRUNE_FUZZ", "40")),
    deadline=None,
    derandomize="NUMPRUNE_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
settings.load_profile("fuzz")
