"""Dispatch and combine for expert parallelism: tokens go to the ranks that hold their experts and come back weighted and summed."""
