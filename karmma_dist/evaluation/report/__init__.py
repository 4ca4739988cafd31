"""From results to what people look at: report.md with plots, report.html, tables in a terminal."""
