"""One module a verb: its help line, its arguments and what it runs; heavy imports inside run()."""
