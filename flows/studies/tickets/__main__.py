"""`python -m numprune.flows.studies.tickets`."""

import sys

from numprune.flows.studies.tickets.command import main

if __name__ == "__main__":
    sys.exit(main())
