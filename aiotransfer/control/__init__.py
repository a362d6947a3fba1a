"""Introducing engines to each other: authenticated control connections over TCP. No payload ever crosses
them."""
