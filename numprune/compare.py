"""The address of the comparison command, `python -m numprune.compare`; all of it stands in flows/compare/."""

import sys

from numprune.flows.compare.command import main

if __name__ == "__main__":
    sys.exit(main())
