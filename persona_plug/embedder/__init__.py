"""The only thing that is trained: histories and requests -> soft tokens."""
