"""Exports for other programs: predictions, and submissions to the official challenges."""
