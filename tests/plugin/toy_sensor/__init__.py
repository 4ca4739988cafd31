"""A package apart: a modality, an encoder for it and a reader of a dataset that has it, all found by entry points."""
