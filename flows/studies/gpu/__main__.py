"""Entry point of `python -m numprune.flows.studies.gpu`."""

import sys

from numprune.flows.studies.gpu.command import main

if __name__ == "__main__":
    sys.exit(main())
