"""A load generator that people use, against ``helexa serve demo``: ``scripts/bench load``."""
