"""Evaluation of plugs: comparisons on LaMP-shaped data, and benchmarks of speed and size. Runs from the checkout."""
