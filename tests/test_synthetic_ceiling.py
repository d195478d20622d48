"""On generated users the best possible score is known exactly: a plug must come close to it, and never by an artefact."""

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
