"""Checks of a job before it trains: every rank, the folders they share, the collectives."""
