"""The on-disk contract between packing and streaming."""
