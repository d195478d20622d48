"""The frozen LLM around soft tokens: prompts, masks, positions, cached states."""
