"""Ranks of a job: who they are, how they join, what they say to each other, and which of them is lost."""
