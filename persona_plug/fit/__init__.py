"""Training one plug, and the report of what it learned."""
