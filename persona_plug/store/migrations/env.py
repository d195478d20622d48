"""Runs migrations over the connection that opening a store hands in, inside its transaction: all or nothing."""

from alembic import context

from persona_plug.store.database import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
with context.begin_transaction():
    context.run_migrations()
