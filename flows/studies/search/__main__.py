"""`python -m numprune.flows.studies.search`."""

import sys

from numprune.flows.studies.search.command import main

if __name__ == "__main__":
    sys.exit(main())
