"""Training: recipes, schedules, checkpoints and the loop."""
