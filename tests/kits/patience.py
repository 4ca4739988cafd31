"""The bound on waits for a process: it catches hanging processes and does not time a busy machine."""

HANGS_S = 600
"""Seconds after which a process counts as hanging: many times what it takes on two busy cores."""
