"""The address of the command, `python -m numprune.flows.speed`."""

import sys

from numprune.flows.speed.command import main

if __name__ == "__main__":
    sys.exit(main())
