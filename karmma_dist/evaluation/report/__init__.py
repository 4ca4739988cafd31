"""Reports of results for people: report.md with plots, report.html, tables in a terminal."""
