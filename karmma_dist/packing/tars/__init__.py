"""Tars: staged clips, assembled in a fixed order, written whole, one writer per folder."""
