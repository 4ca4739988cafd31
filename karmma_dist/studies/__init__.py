"""A table of a paper as a file: all its runs over several seeds, their evaluation, and one report."""
