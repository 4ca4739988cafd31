"""A synthetic kitchen: recordings to pack if no dataset is available."""
