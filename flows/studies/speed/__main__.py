"""Entry point of `python -m numprune.flows.studies.speed`."""

import sys

from numprune.flows.studies.speed.command import main

if __name__ == "__main__":
    sys.exit(main())
