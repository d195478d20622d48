"""One file a revision, named by its number; the last number is `persona_plug.store.database.HEAD`."""
