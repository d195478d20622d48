"""`python -m eval.harness`: the harness's own command line, with the model `persona_plug` registered."""

from __future__ import annotations

import sys

from persona_plug.errors import PersonaPlugError
from persona_plug.files import write_any_text

write_any_text()
try:
    from eval.harness.lm_eval_model import main
except PersonaPlugError as error:
    sys.exit(f"error: {error}")

main()
