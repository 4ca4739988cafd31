"""The diagnosis of a machine."""
