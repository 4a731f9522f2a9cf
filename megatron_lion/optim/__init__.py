"""LION: the algorithm, its kernels, and its place in Megatron's distributed optimizer."""
