"""LION (algorithm, kernels, reduced-precision state), SGD, and their place in Megatron's DistributedOptimizer."""
