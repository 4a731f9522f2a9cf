"""The subjects of growth.py beside `compare`, and how a process is metered."""
