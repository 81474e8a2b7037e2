"""`python -m tuner.cli` is `stagevar-tune`, for a checkout that is not installed."""

import sys

from tuner.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
