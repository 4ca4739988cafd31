"""What a model costs: FLOPs, parameters, tokens, memory and latency per subset of modalities."""
