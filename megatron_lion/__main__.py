"""Entry point of `python -m megatron_lion`, which the launcher starts as its ranks."""

import sys

from megatron_lion.cli import main

if __name__ == "__main__":
    sys.exit(main())
