"""Files, the cache of a node, downloads."""
