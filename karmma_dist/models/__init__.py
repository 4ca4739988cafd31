"""Encoders, fusion block and the model of KARMMA: tensors in, logits out. No data loading, no ranks."""
