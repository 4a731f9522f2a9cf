"""Faults that are injected into the product, and the table of their outcomes; `make chaos` lists the cases.

- shim.c, shim.py: a library for LD_PRELOAD that refuses, cuts or kills at the n-th file call below a folder.
- server.py, warm.py: processes that are forked from one that imported torch and megatron-core, with the shim loaded.
- rows.py: what a case counts, the register of cases, and the file of results.
- lab.py: small runs, their undisturbed twins, and the verdict on a run that was disturbed.
- cases_*.py: the cases, one family a file. page.py writes docs/scorecard.md from the results.
"""
