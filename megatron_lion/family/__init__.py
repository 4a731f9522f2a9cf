"""Relatives of LION from the literature, as plain `torch.optim.Optimizer` classes for modules that are not sharded."""
