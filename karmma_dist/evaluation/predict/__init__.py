"""Predictions of a trained model for single clips."""
