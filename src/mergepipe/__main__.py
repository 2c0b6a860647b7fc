"""``python -m mergepipe`` is the command ``mergepipe``."""

import sys

from mergepipe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
