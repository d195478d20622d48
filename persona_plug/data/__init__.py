"""Data sets made on the spot: Debian's package index through apt, and generated users with known habits.

`debian.build()` and `synthetic.build()` both return a `RecordSet`: records in the project's event format,
the prompt template that goes with them, and the facts about their making. Nothing heavy is imported here;
import the submodule.
"""

from persona_plug.data.records import RecordSet, write_records

__all__ = ["RecordSet", "write_records"]
