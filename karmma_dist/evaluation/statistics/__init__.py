"""Bootstrap intervals, and paired tests between models."""
