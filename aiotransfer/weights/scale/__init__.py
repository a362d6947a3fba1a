"""Large public models: their plans, computed from shapes and placements alone, and a prediction of their
times."""
