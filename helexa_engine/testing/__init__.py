"""Seeded inputs, tiny checkpoints and stand-ins, for tests/ and benchmarks/ only."""
