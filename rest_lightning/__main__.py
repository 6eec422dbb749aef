"""``python -m rest_lightning`` is ``rest``."""

import sys

from rest_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
