"""KV caches for engines that step in a thread without an event loop: start, cancel, and a look at what has
finished."""
