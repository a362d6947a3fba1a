"""tcp, efa and verbs: peers on other hosts, by completion queues of libfabric or libibverbs."""
