"""The page of `persona-plug demo`: `session` is what it does, `view` how it reads, `page` the widgets around it."""
