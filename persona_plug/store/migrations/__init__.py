"""Alembic migrations of the store's tables; `persona_plug.store.database` runs them when a store is opened."""
