"""Who sends what to whom: from two layouts and rules a plan, and what each rank does in it. Pure."""
