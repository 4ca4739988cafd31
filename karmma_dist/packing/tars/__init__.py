"""Tars: clips are staged, assembled in a fixed order, and written whole, by one writer per folder."""
