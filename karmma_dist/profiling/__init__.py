"""Costs of a model: FLOPs, parameters, tokens, memory and latency on every subset of modalities."""
