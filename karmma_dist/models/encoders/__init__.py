"""Encoders of one modality each."""
