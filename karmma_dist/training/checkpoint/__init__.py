"""Checkpoints: saved in the background, loaded on any number of ranks."""
