"""``python -m s3tensor``: the command line."""

from __future__ import annotations

import sys

from s3tensor.cli import main

if __name__ == "__main__":
    sys.exit(main())
