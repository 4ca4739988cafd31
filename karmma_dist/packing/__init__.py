"""Packing of raw datasets into shards. Start at `pack.py`; `spec.py` holds the settings."""
