"""Verification and repair of a folder of shards."""
