#!/bin/sh
# Prints the path of the first Python 3.12 or newer (PYTHON is tried first), or how to install one.
for candidate in ${PYTHON:-} python3.12 python3.13 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then
        command -v "$candidate"
        exit 0
    fi
done
echo "megatron-lion needs Python 3.12 or newer and found none on the PATH." >&2
echo "Install one (for example: apt install python3.12 python3.12-venv, or pyenv install 3.12), or name it: make PYTHON=/path/to/python3.12 ..." >&2
exit 9
