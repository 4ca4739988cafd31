"""Tables and contact sheets of packed clips."""
