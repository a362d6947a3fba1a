"""What this machine has: its topology, the NUMA node of memory, memory that is free, the CUDA driver."""
