"""The commands: each parses its arguments, calls one function and prints. Heavy imports happen only when one runs."""
