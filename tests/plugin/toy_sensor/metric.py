"""The metric `top2`: the share of clips whose class is among the two likeliest."""

from karmma_dist.evaluation.metrics import Metric, top_k

TOP2 = Metric("top2", "top-2", right=top_k(2))
