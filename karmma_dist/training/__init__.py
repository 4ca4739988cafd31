"""Training: batches -> checkpoints and weights, through DeepSpeed, which only `engine.py` imports."""
