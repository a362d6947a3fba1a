"""The decode side: which pages requests hold, and one request from its question to its pages."""
