"""`python -m eval.tiny [key=value ...]`: every method on every task shape with random tiny models. Checks the paths.

Settings that are not its own go to the comparison, see configs/tiny/all_methods.yaml. `write` makes LaMP-shaped folders
of generated users. Their numbers mean nothing here, except in the negative control: where answers do not depend on the
user, no method may show a lift.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from persona_plug.errors import ConfigError
from training.config import Settings, load, run_command

WORDS = ("storm", "river", "engine", "castle", "forest", "market", "violin", "desert", "lantern", "harbour", "meadow")
# Shape -> task, instruction, and a profile item's fields.
SHAPES: dict[str, tuple[str, str, tuple[str, str]]] = {
    "label": ("LaMP_2", "Which tag does this movie relate to? description: ", ("description", "tag")),
    "rating": ("LaMP_3", "What is the score of the following review? review: ", ("text", "score")),
    "text": ("LaMP_5", "Generate a title for the following abstract of a paper: ", ("abstract", "title")),
    "own_text": ("LaMP_7", "Paraphrase the following tweet: ", ("", "text")),
}
LABELS = {"label": ("comedy", "action", "classic"), "rating": ("1", "3", "5")}
CONFIG = Path(__file__).parent.parent / "configs" / "tiny" / "all_methods.yaml"


@dataclass(frozen=True, kw_only=True)
class TinySettings(Settings):
    """Settings of `python -m eval.tiny [key=value ...]`; those of a comparison may be given, too (`eval.run --help`).

    Attributes:
        out: Folder with a subfolder for each task shape.
        shapes: Task shapes: `label`, `rating`, `text`, `own_text`.
        users: Training users.
        dev_users: Users whose questions are asked.
        personal: Whether answers follow the user's taste; else they are drawn alike for all.
    """

    out: str = "build/bench-tiny"
    shapes: tuple[str, ...] = tuple(SHAPES)
    users: int = 8
    dev_users: int = 4
    personal: bool = True

    def check(self) -> None:
        """Refuse values that cannot work, naming the field."""
        self.require_at_least(2, "users", "dev_users")
        if unknown := [shape for shape in self.shapes if shape not in SHAPES]:
            raise ConfigError(f"shapes: {unknown[0]!r} is not one of {', '.join(SHAPES)}")


def write(
    folder: Path,
    shape: str,
    users: int = 8,
    items: int = 4,
    questions: int = 2,
    personal: bool = True,
    dev_users: int | None = None,
) -> None:
    """Write `{train,dev}_{questions,outputs}.json` of generated users.

    Args:
        folder: Where.
        shape: A key of `SHAPES`.
        users: Training users.
        items: Items of a profile.
        questions: Questions a user.
        personal: Whether answers follow the user's taste; else they are drawn alike for all.
        dev_users: Users of the dev split; default half of `users`.
    """
    task, instruction, (input_field, output_field) = SHAPES[shape]
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", users), ("dev", dev_users or users // 2)):
        rows, golds = [], []
        for u in range(count):
            taste = int(rng.integers(3))

            def answer(text: str, taste: int = taste) -> str:
                if shape in LABELS:
                    favourite = rng.random() < 0.8 if personal else False
                    return LABELS[shape][taste if favourite else int(rng.integers(3))]
                return (
                    f"{('oh', 'well', 'so')[taste if personal else int(rng.integers(3))]} {' '.join(text.split()[:2])}"
                )

            def draw() -> str:
                return " ".join(rng.choice(WORDS, 5)) + f" {rng.integers(1000)}"

            profile = []
            for i in range(items):
                text = draw()
                item = {output_field: answer(text), "id": f"{split}{u}-{i}", "date": f"2020-01-{i + 1:02d}"}
                profile.append(item | ({input_field: text} if input_field else {}))
            for q in range(questions):
                ident, text = f"{split}{u}-q{q}", draw()
                question = {"id": ident, "user_id": f"{split}{u}", "input": instruction + text, "profile": profile}
                rows.append(question)
                golds.append({"id": ident, "output": answer(text)})
        (folder / f"{split}_questions.json").write_text(json.dumps(rows), encoding="utf-8")
        (folder / f"{split}_outputs.json").write_text(json.dumps({"task": task, "golds": golds}), encoding="utf-8")


def main(arguments: Sequence[str]) -> None:
    """Run all methods on all shapes."""
    from eval import run
    from eval.settings import ComparisonSettings

    fields = {field.name for field in dataclasses.fields(TinySettings)}
    own = [a for a in arguments if a.partition("=")[0] in fields]
    settings = load(own, TinySettings)
    more = [a for a in arguments if a not in own]
    runs = []
    for shape in settings.shapes:
        folder = Path(settings.out) / shape
        paths = [f"data={folder / 'data'}", f"task={SHAPES[shape][0]}", f"out={folder / 'run'}"]
        runs.append([str(CONFIG), *paths, *more])
        load(runs[-1], ComparisonSettings)  # refuses what is wrong before anything is run
    for shape, of_shape in zip(settings.shapes, runs, strict=True):
        data = Path(settings.out) / shape / "data"
        write(data, shape, settings.users, personal=settings.personal, dev_users=settings.dev_users)
        run.main(of_shape)


if __name__ == "__main__":
    run_command(main, TinySettings)
