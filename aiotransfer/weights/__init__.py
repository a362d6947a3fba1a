"""New weights in place: from trainers to inference."""
