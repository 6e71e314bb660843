"""Entry point of `python -m numprune.flows.studies.error_rates`."""

import sys

from numprune.flows.studies.error_rates.command import main

if __name__ == "__main__":
    sys.exit(main())
