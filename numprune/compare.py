"""The address of the comparison command, `python -m numprune.compare`; all of it stands in flows/studies/compare/."""

import sys

if __name__ == "__main__":
    # Not before: every process that the command starts imports this module anew.
    from numprune.flows.studies.compare.command import main

    sys.exit(main())
