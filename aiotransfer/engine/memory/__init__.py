"""Memory of this engine, and the rights to it that peers hold."""
