"""The frozen LLM around soft tokens: prompts, masks, positions, states that are kept."""
