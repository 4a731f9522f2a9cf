"""Entry point of `python -m megatron_lion`, which the launcher starts as its ranks."""

from megatron_lion.cli import entry

if __name__ == "__main__":
    entry()
