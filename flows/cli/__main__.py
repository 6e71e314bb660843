import sys

from numprune.flows.cli import main

sys.exit(main())
