"""Preemption, steps that are skipped, clips that are damaged."""
