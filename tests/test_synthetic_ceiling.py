"""On generated users the best possible score is known exactly: a plug must come close to it, and never by an artefact."""

import numpy as np
import pytest

from persona_plug.data import synthetic
from persona_plug.history import Example
from persona_plug.report import make_report
from persona_plug.stats import user_bootstrap
from persona_plug.training_data import prepare

SETTINGS = {
    "steps": 200,
    "batch_size": 64,
    "lr": 1e-2,
    "eval_every": 25,
    "eval_samples": 256,
    "dropout": 0.0,
    "history_dropout": 0.2,
    "empty_history": 0.05,
}
