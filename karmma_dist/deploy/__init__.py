"""A trained model as one file that takes any subset of sensors, and the runtime for it, without PyTorch."""
