"""`python -m tuner.cli` is `stagevar-tune`, where a checkout is run that is not installed."""

import sys

from tuner.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
