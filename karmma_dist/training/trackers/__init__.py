"""Trackers: receivers of a run's metrics in addition to metrics.jsonl."""

from karmma_dist.training.trackers.tracker import Tracker, TrackerType

__all__ = ["Tracker", "TrackerType"]
