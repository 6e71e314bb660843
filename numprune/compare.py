"""Entry point of the comparison, `python -m numprune.compare`, which is implemented in flows/studies/compare/."""

import sys

if __name__ == "__main__":
    # Imported here because every process that the command starts imports this module again.
    from numprune.flows.studies.compare.command import main

    sys.exit(main())
