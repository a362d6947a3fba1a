"""Memory as the roles use it: host memory, GPUs and files, converted and summed."""
