"""Users in a database: histories as vectors, and as texts where asked."""
