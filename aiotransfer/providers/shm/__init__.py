"""shm: engines of one host that map each other's memory, and how they pass descriptors of it."""
