"""Entry point of `python -m faults`; the cases run in processes that import runner.py again."""

import sys

from faults.runner import main

if __name__ == "__main__":
    sys.exit(main())
