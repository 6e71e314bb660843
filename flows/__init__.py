"""The whole chain, its recipe, and the command line.

`recipe` says what is wanted and refuses what cannot work; `stages` makes each step's folder once and only once;
`children` gives a step a process of its own; `steps` holds their bodies, a few calls each into the other packages;
`chain` strings them together, `execute` runs them, `optimize` as a Prefect flow; `cli` is the command line; `studies`
holds the measurements reported in the documentation, and rival methods. No other package of this project imports it.
"""

import os

for _name, _value in {  # read by Prefect on import; none of these overrides user settings
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "numprune",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "DO_NOT_TRACK": "1",
}.items():
    os.environ.setdefault(_name, _value)
