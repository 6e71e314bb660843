"""`python -m numprune.flows.studies.learned`."""

import sys

from numprune.flows.studies.learned.command import main

if __name__ == "__main__":
    sys.exit(main())
