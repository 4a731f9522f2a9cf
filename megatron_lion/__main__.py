"""`python -m megatron_lion`, and the worker that torchrun starts."""

import sys

from megatron_lion.cli import main

if __name__ == "__main__":
    sys.exit(main())
