"""Serving: engines that write answers behind soft tokens, and the OpenAI-compatible gateway in front of them."""
