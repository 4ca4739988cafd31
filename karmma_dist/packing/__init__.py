"""Raw datasets -> shards. Start at `pack.py`; `spec.py` says what can be chosen."""
