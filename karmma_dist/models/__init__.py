"""The KARMMA model, its encoders and fusion block: tensors in, logits out, without data loading or ranks."""
