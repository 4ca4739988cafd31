"""A synthetic kitchen: recordings to pack where no dataset is at hand."""
