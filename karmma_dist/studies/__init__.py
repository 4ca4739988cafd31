"""Studies: a table of a paper as a file, with all its runs over several seeds, their evaluation, and one report."""
