"""A model for lm-evaluation-harness that scores behind soft tokens: `python -m eval.harness`."""
