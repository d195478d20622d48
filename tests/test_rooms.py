"""Which room may import which: imports inside functions and for type checkers count, too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up: a room imports rooms above its own line, and of those only the ones named.
ROOMS = {
    "errors": "",
    "files": "",
    "clock": "",
    "config": "errors",
    "data": "errors",
    "models": "clock errors files",
    "splice": "clock config errors models",
    "embedder": "config data errors models splice",
    "retrieval": "data errors models",
    "store": "config data embedder errors models",
    "heads": "config data embedder errors splice store",
    "generation": "config data embedder errors heads splice store",
    "pairing": "config data errors models splice store",
    "model": "config data embedder errors generation heads models pairing splice store",
    "persistence": "config data embedder errors files heads models",
    "dataset": "config data embedder errors heads model splice",
    "export": "data embedder errors files generation model models",
    "measure": "config data dataset errors model models",
    "fit": "clock config data dataset errors files generation heads measure model models pairing persistence",
    "plug": "config data errors fit model models persistence",
    "serving": "data errors export files generation heads models pairing persistence plug splice store",
    "page": "config data errors fit generation measure persistence plug store",
    "cli": "clock config data errors export files fit models page persistence plug serving store",
    "__main__": "cli",
    "training": "clock config data dataset embedder errors files fit measure models plug splice",
    "eval": "clock config data errors files fit measure model models plug retrieval serving splice store training",
}
ROOT_MODULES = 12  # modules at the root of persona_plug, at most


def module_name(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def room_of(module):
    top, _, rest = module.partition(".")
    return rest.partition(".")[0] if top == "persona_plug" else top


def imported_modules(source, modules):
    """Modules of the project that a source names in any import, wherever it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in modules else node.module for name in names)


def import_graph():
    """Module -> modules of the project that it imports; the package's own face, which hands names on, left out."""
    paths = [p.relative_to(ROOT) for top in ("persona_plug", "training", "eval") for p in (ROOT / top).rglob("*.py")]
    modules = {module_name(path): path for path in paths}
    return {
        module: {other for other in imported_modules((ROOT / path).read_text(), modules) if other in modules} - {module}
        for module, path in modules.items()
        if module != "persona_plug"
    }


def circle(graph):
    """Return a list of nodes that import each other in a circle, or None."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return path[path.index(node) :]
        if node in done:
            return None
        path.append(node)
        for other in sorted(graph.get(node, ())):
            if ring := visit(other):
                return ring
        path.pop()
        done.add(node)
        return None

    return next((ring for node in sorted(graph) if (ring := visit(node))), None)


GRAPH = import_graph()


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


@pytest.mark.parametrize(
    "source",
    [
        "from persona_plug.model import PlugModel",
        "def f():\n    from persona_plug import model",
        "if TYPE_CHECKING:\n    import persona_plug.model",
    ],
)
def test_every_kind_of_import_is_seen(source):
    assert list(imported_modules(source, {"persona_plug.model": None})) == ["persona_plug.model"]


def test_no_file_imports_itself_in_a_circle():
    assert circle(GRAPH) is None


def test_rooms_are_listed_from_the_ground_up():
    names = list(ROOMS)
    for at, (room, below) in enumerate(ROOMS.items()):
        assert not set(below.split()) - set(names[:at]), room


def test_a_room_imports_only_what_its_line_names():
    crossings = {room: set() for room in ROOMS}
    for module, others in GRAPH.items():
        crossings[room_of(module)] |= {
            room_of(other) for other in others if room_of(other) not in ("", room_of(module))
        }
    assert crossings == {room: set(below.split()) for room, below in ROOMS.items()}


def test_the_root_of_the_package_is_nearly_empty():
    modules = [p.stem for p in (ROOT / "persona_plug").glob("*.py") if not p.stem.startswith("__")]
    assert len(modules) <= ROOT_MODULES, sorted(modules)
