"""Entry point of `python -m numprune.flows.studies.genai`."""

import sys

from numprune.flows.studies.genai.command import main

if __name__ == "__main__":
    sys.exit(main())
