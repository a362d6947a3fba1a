"""Adapters for serving systems, each in a package of its own, which imports that system only when it is
used."""
