"""Checkpoints: written in the background, loadable on any number of ranks."""
