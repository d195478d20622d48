"""Benchmarks of speed and size: ratios of two things measured in one process, interleaved."""
