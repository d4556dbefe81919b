"""``python -m hybridflow`` is the command `hybridflow`."""

import sys

from hybridflow.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
