"""Fault tolerance: preemption, skipped steps, damaged clips."""
