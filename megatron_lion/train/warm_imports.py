"""What a sweep's fork server imports, once, for all runs. It starts no thread, touches no GPU and joins no process group."""

import os

import megatron_lion.train.loop  # noqa: F401

# A fork copies the calling thread only. A lock that another one holds at that moment stays locked in the child for ever.
THREADS = len(os.listdir("/proc/self/task"))
