"""Shards -> batches: which clip when (`order`), what is read, decoded, augmented, and put together."""
