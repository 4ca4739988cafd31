"""Tars."""
