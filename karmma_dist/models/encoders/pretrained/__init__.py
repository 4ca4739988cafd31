"""Encoders of the packages transformers and timm, whose weights are in folders of the Hugging Face hub."""
