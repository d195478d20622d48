"""Alembic migrations of the store's tables; `persona_plug.store_engine` runs them when a store is opened."""
