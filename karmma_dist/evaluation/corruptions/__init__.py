"""Broken sensors: kinds of corruption, their effect on arrays, and batches under them."""
