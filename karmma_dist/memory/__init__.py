"""Memories: what a frozen model said of a view, stored so that it is computed once."""
