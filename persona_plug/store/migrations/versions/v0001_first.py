"""Users, their items, and what the store was made for."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the tables."""
    name = sa.String().with_variant(sa.String(collation="C"), "postgresql")  # order by bytes, as SQLite does
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite counts up only what it calls INTEGER
    op.create_table(
        "persona_store",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("encoder", sa.String, nullable=False),
        sa.Column("dim", sa.Integer, nullable=False),
        sa.Column("vectors", sa.String, nullable=False),
        sa.Column("keep_text", sa.Boolean, nullable=False),
    )
    op.create_table(
        "persona_users",
        sa.Column("key", number, primary_key=True),
        sa.Column("name", name, nullable=False, unique=True),
        sa.Column("items", sa.Integer, nullable=False),
        sa.Column("next", sa.BigInteger, nullable=False),
        sa.Column("updated", sa.Double, nullable=False),
    )
    op.create_table(
        "persona_items",
        sa.Column("id", number, primary_key=True, autoincrement=False),
        sa.Column("user_key", number, nullable=False),
        sa.Column("item_id", name, nullable=False),
        sa.Column("at", sa.Double),
        sa.Column("hashes", sa.LargeBinary, nullable=False),
        sa.Column("vectors", sa.LargeBinary, nullable=False),
        sa.Column("input", sa.LargeBinary),
        sa.Column("output", sa.LargeBinary),
        sa.UniqueConstraint("user_key", "item_id"),
    )
    if op.get_bind().dialect.name == "postgresql":
        # The planner's statistics keep samples of a column's values, also after their rows are gone.
        columns = [("persona_users", "name")]
        columns += [("persona_items", c) for c in ("item_id", "hashes", "vectors", "input", "output")]
        for table, column in columns:
            op.execute(f"ALTER TABLE {table} ALTER COLUMN {column} SET STATISTICS 0")
