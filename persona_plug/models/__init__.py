"""The frozen models: names, LLMs, encoders, fingerprints, the cache of vectors."""
