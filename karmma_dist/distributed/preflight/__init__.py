"""Checks of a job before training: every rank, the shared folders, the collectives."""
