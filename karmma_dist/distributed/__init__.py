"""Ranks of a job: their numbers, process group, collectives, heartbeats and checks."""
