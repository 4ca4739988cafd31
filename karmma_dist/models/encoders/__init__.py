"""The encoders, each of which takes one modality at a time."""
