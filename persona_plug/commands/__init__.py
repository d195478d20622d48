"""Commands of `persona-plug` that have a file of their own; nothing heavy is imported before one runs."""
