"""The full gradient: accumulation at frozen parameters and norms over shards."""
