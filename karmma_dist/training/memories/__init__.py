"""The use of memories in training: what they must be of, and a step's answers and tokens, remembered or stored anew."""
