"""Evaluation of models whose sensors fail: conditions -> masks -> ranks of the true classes -> rows -> report."""
