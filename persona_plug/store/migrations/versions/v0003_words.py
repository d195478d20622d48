"""What heads keep of items' texts."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Create the table."""
    binary = "BLOB" if op.get_bind().dialect.name == "sqlite" else "BYTEA"
    op.execute(
        f"CREATE TABLE persona_words (mark {binary} PRIMARY KEY, owner {binary} NOT NULL, identity TEXT NOT NULL,"
        f" sealed {binary} NOT NULL)"
    )
    op.execute("CREATE INDEX persona_words_owner ON persona_words (owner)")
