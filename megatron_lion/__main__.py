"""Entry point of `python -m megatron_lion`, which torchrun starts as its worker."""

import sys

from megatron_lion.cli import main

if __name__ == "__main__":
    sys.exit(main())
