"""Batches -> checkpoints and weights, through DeepSpeed. Only `engine.py` imports it."""
