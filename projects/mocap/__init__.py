"""A dataset of human actions, rendered from motion capture."""
