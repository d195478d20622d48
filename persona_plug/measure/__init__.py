"""How good an answer is: metrics, intervals, and predictions without an LLM."""
