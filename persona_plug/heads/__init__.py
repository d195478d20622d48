"""Heads on the frozen LLM's own states and logits: a memory of the user's own words, and the gate that mixes it in."""
