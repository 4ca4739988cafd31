"""Shards -> batches: the order of clips, and their reading, decoding, augmentation and collation."""
