"""Training: one step, the loop around it, and what is decided before the first step."""
