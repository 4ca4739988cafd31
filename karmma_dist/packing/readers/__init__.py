"""Readers of raw datasets: annotations and files into clip records."""
