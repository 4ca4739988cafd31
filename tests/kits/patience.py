"""How long tests wait for a process: a bound is there to catch what hangs, not to time what a busy machine does."""

HANGS_S = 600
"""Seconds after which a process counts as hanging: many times what it takes on two busy cores."""
