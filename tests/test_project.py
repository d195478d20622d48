"""The project as a whole: what it imports, ships and must never contain."""

import ast
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import persona_plug

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "persona_plug"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = {"torch", "transformers", "datasets", "accelerate", "peft", "sklearn", "matplotlib", "pyarrow"}


def repo_files():
    """Files that are tracked or would be by `git add .`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    files = [ROOT / name for name in names if name and (ROOT / name).is_file()]
    assert PACKAGE / "__init__.py" in files
    return files


def relative(path):
    return path.relative_to(ROOT).as_posix()


# Imports


def imported_by(command):
    """Top-level modules that a Python process imports, and what it prints; it must succeed."""
    env = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, check=False)
    assert result.returncode == 0, result.stderr
    profile = re.findall(r"^import time:[^|]*\|[^|]*\| *(\w+)", result.stderr, re.MULTILINE)
    return set(profile), result.stdout


def cpu_seconds(command):
    """Least processor time of three runs: waiting for other processes does not count."""
    code = (
        "import resource, subprocess, sys; "
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); print(used.ru_utime + used.ru_stime)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, check=True, capture_output=True)
        for _ in range(3)
    ]
    return min(float(run.stdout) for run in runs)


def test_import_profile_sees_a_module():
    assert "xml" in imported_by([sys.executable, "-c", "import xml.dom.minidom"])[0]


def test_import_loads_nothing_heavy():
    seen, _ = imported_by([sys.executable, "-c", "import persona_plug; dir(persona_plug)"])
    assert "persona_plug" in seen
    assert not seen & HEAVY


def test_import_is_quick():
    bare = cpu_seconds([sys.executable, "-c", "pass"])
    assert cpu_seconds([sys.executable, "-c", "import persona_plug"]) - bare < 0.1


@pytest.mark.parametrize("name", persona_plug.__all__)
def test_public_name_resolves(name):
    assert getattr(persona_plug, name) is not None
    assert name in dir(persona_plug)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = persona_plug.nonsense


def test_public_names_are_typed_as_they_are_loaded():
    """The imports for type checkers name the same modules as the lazy ones."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = {
        alias.name: node.module.removeprefix("persona_plug.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("persona_plug.")
        for alias in node.names
    }
    assert typed == persona_plug._MODULES
    assert sorted([*typed, "__version__"]) == sorted(persona_plug.__all__)


def commands():
    """Every command of the command line, groups included, as a list of words."""
    import typer

    from persona_plug.cli import app

    def walk(command, words):
        yield words
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, [*words, name])

    return list(walk(typer.main.get_command(app), []))


def test_help_of_every_command_loads_nothing_heavy():
    script = Path(sys.executable).parent / "persona-plug"
    found = commands()
    assert ["fit"] in found
    for words in found:
        seen, text = imported_by([sys.executable, str(script), *words, "--help"])
        assert "Usage" in text
        assert not seen & HEAVY, f"persona-plug {' '.join(words)} --help"


def test_help_takes_under_a_second():
    script = Path(sys.executable).parent / "persona-plug"
    assert cpu_seconds([sys.executable, str(script), "--help"]) < 1


def imports_of(tree):
    """(top-level name of the imported module, whether importing the file imports it) of each import."""
    lazy = {
        id(node)
        for scope in ast.walk(tree)
        if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(scope, ast.If) and "TYPE_CHECKING" in ast.unparse(scope.test))
        for node in ast.walk(scope)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            yield name.partition(".")[0], id(node) not in lazy


def distributions(requirements):
    """Names by which the required distributions are imported."""
    modules = {"scikit-learn": "sklearn", "pyyaml": "yaml"}
    names = [re.match(r"[\w.-]+", requirement)[0].lower() for requirement in requirements]
    return {modules.get(name, name).replace("-", "_") for name in names}


# A folder that is there for one extra may import it outright; nothing below imports the folder.
EXTRA_OF = {"serving": "serve", "app": "app", "words_logits.py": "vllm"}  # of a folder, or of a file that vLLM loads


def undeclared(tree, extra=None):
    extras = PROJECT["optional-dependencies"]
    core = distributions([*PROJECT["dependencies"], *(extras[extra] if extra else ())])
    optional = distributions(r for extra in extras if extra not in ("dev", "docs", "services") for r in extras[extra])
    known = core | set(sys.stdlib_module_names) | {"persona_plug"}
    return [name for name, eager in imports_of(tree) if name not in (known if eager else known | optional)]


def test_package_imports_only_what_it_declares():
    """Core dependencies anywhere, those of extras where they are used or in their folder, no training, no eval."""
    bad = {
        relative(p): undeclared(ast.parse(p.read_text()), EXTRA_OF.get(p.name, EXTRA_OF.get(p.parent.name)))
        for p in SOURCES
    }
    assert not {path: names for path, names in bad.items() if names}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import peft", ["peft"]),
        ("def f():\n    import peft", []),
        ("if TYPE_CHECKING:\n    import peft", []),
        ("from eval.metrics import metrics", ["eval"]),
        ("def f():\n    from training import run", ["training"]),
        ("import sklearn.svm, yaml, json\nfrom . import zoo", []),
    ],
)
def test_undeclared_imports_are_seen(source, names):
    assert undeclared(ast.parse(source)) == names


def test_training_does_not_import_eval():
    for path in sorted((ROOT / "training").rglob("*.py")):
        assert "eval" not in {name for name, _ in imports_of(ast.parse(path.read_text()))}, relative(path)


# Load path

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "pandas.read_pickle", "pd.read_pickle", "yaml.load"}
UNSAFE_SETTINGS = {"trust_remote_code": True, "allow_pickle": True, "weights_only": False}


def settings(node):
    """(name, value) of each keyword argument, dictionary entry or default that a node holds."""
    if isinstance(node, ast.Call):
        yield from ((keyword.arg, keyword.value) for keyword in node.keywords)
    elif isinstance(node, ast.Dict):
        yield from zip((getattr(key, "value", None) for key in node.keys), node.values, strict=True)
    elif isinstance(node, ast.arguments):
        last_first = reversed([arg.arg for arg in (*node.posonlyargs, *node.args)])
        yield from zip(last_first, reversed(node.defaults), strict=False)
        yield from zip((arg.arg for arg in node.kwonlyargs), node.kw_defaults, strict=True)


def unsafe(tree):
    """Ways in which a loaded file could run code."""
    found = [name for name, _ in imports_of(tree) if name in UNSAFE_MODULES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in UNSAFE_CALLS:
            found.append(ast.unparse(node.func))
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += ["torch.load" for alias in node.names if alias.name == "load"]
        for name, value in settings(node):
            if name in UNSAFE_SETTINGS and getattr(value, "value", None) is UNSAFE_SETTINGS[name]:
                found.append(f"{name}={UNSAFE_SETTINGS[name]}")
    return found


def test_nothing_loaded_can_run_code():
    bad = {relative(path): unsafe(ast.parse(path.read_text())) for path in SOURCES}
    assert not {path: found for path, found in bad.items() if found}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "torch.load(path)",
        "from torch import load",
        "eval(text)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "def build(name, *, trust_remote_code=True): ...",
        "def build(name, trust_remote_code=True): ...",
    ],
)
def test_unsafe_loading_is_seen(source):
    assert unsafe(ast.parse(source))


def test_safe_loading_is_not_blamed():
    assert not unsafe(ast.parse("model.eval()\nload(path, trust_remote_code=False)\n'never pickle.load'"))


# Repository


def private_patterns():
    """Paths of one machine and hosts of package registries, built here so that this file contains none."""
    folders = "|".join(["root", "work", "home", "Users", "mnt"])
    hosts = [("pypi", "org"), ("pythonhosted", "org"), ("download.pytorch", "org"), ("registry.npmjs", "org")]
    hosts += [("deb.debian", "org"), ("pypi", "python", "org"), ("anaconda", "org")]
    local = "|".join(["wheels", "pypi"])
    return [
        re.compile(rf"(?<![\w.~*)\]}}-])/(?:{folders})/"),
        re.compile(rf"/opt/(?:{local})"),
        re.compile(r"[A-Z]:\\" + "Users"),
        *(re.compile(rf"\b{re.escape('.'.join(host))}\b") for host in hosts),
    ]


@pytest.mark.parametrize(
    "text",
    ["cd /" + "root/x", '"/' + 'home/me/"', "https://" + "pypi" + ".org/simple", "file:///" + "opt/wheels"],
)
def test_machine_paths_and_hosts_are_seen(text):
    assert any(pattern.search(text) for pattern in private_patterns())


def test_no_machine_paths_or_registry_hosts():
    patterns = private_patterns()
    found = []
    for path in repo_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            found += [f"{relative(path)}:{number}: {line.strip()}" for p in patterns if p.search(line)]
    assert not found


def test_no_large_files_or_weights():
    files = repo_files()
    assert not [relative(path) for path in files if path.stat().st_size > 1_000_000]
    assert not [relative(path) for path in files if path.suffix in (".safetensors", ".gguf", ".bin", ".pt")]


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_source_is_short_enough_to_read(path):
    assert len(path.read_text().splitlines()) <= 400


def test_version_is_stated_once():
    assert persona_plug.__version__ == PROJECT["version"]


def test_readme_is_the_package_description():
    hooks = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]
    assert PROJECT["dynamic"] == ["readme"]
    assert hooks["fancy-pypi-readme"]["fragments"] == [{"path": "README.md"}]


def test_make_lists_its_targets():
    text = subprocess.run([shutil.which("make")], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for target in ("env", "test", "lint", "docs", "demo", "bench", "clean"):
        assert f"make {target} " in text


# Wheel


def test_wheel_holds_the_package_alone(tmp_path):
    """Sources are copied first: a build must neither read nor leave anything else in the working tree."""
    tree, out = tmp_path / "tree", tmp_path / "out"
    for path in repo_files():
        target = tree / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for name in ("tests", "training", "eval", "configs"):  # present, so that they could slip in
        (tree / name / "probe").mkdir(parents=True)
        (tree / name / "probe" / "__init__.py").touch()
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"persona_plug-{PROJECT['version']}.dist-info/METADATA").decode()
    shipped = {name for name in names if ".dist-info/" not in name}
    present = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert shipped == {relative(path) for path in present}
    assert {"persona_plug/py.typed", "persona_plug/__init__.py"} <= shipped
    assert "License-Expression: Apache-2.0" in metadata
    assert "\n# persona_plug\n" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in names)


# Environment: torch is chosen on purpose


@pytest.fixture
def env_script():
    loader = importlib.machinery.SourceFileLoader("env_script", str(ROOT / ".ci" / "env"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("env_script", loader))
    loader.exec_module(module)
    return module


@pytest.fixture
def bare_python(tmp_path, monkeypatch):
    """Python of a new environment that finds packages in tmp_path/wheels only, on a machine without a GPU."""
    import pip

    folder = tmp_path / "venv"
    venv.create(folder, symlinks=True, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "pip").symlink_to(Path(pip.__file__).parent)
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("ALLOW_CUDA", raising=False)
    return folder / "bin" / "python"


def make_wheel(folder, name, version, requires=()):
    info = f"{name}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    files = {
        f"{info}/METADATA": "\n".join([*lines, *(f"Requires-Dist: {r}" for r in requires), ""]),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{name}_stub.py": "",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"]))


def test_env_takes_a_cpu_build_of_torch(env_script, bare_python, tmp_path):
    make_wheel(tmp_path / "wheels", "torch", "2.13.0+cpu")
    assert env_script.install_torch(bare_python, "torch==2.13.0") == "2.13.0+cpu"


def test_env_refuses_cuda_without_a_gpu(env_script, bare_python, tmp_path, monkeypatch):
    make_wheel(tmp_path / "wheels", "torch", "2.13.0", ["nvidia-cublas"])
    make_wheel(tmp_path / "wheels", "nvidia_cublas", "13.1")
    with pytest.raises(SystemExit, match=r"no GPU here.*PIP_EXTRA_INDEX_URL.*TORCH=.*ALLOW_CUDA") as refusal:
        env_script.install_torch(bare_python, "torch==2.13.0")
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.glob("venv/lib/*/site-packages/torch-*"))

    monkeypatch.setenv("ALLOW_CUDA", "1")
    assert env_script.install_torch(bare_python, "torch==2.13.0") == "2.13.0"


def test_env_leaves_the_choice_to_a_machine_with_a_gpu(env_script, bare_python, tmp_path):
    make_wheel(tmp_path / "wheels", "torch", "2.13.0", ["nvidia-cublas"])
    make_wheel(tmp_path / "wheels", "nvidia_cublas", "13.1")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert env_script.install_torch(bare_python, "torch==2.13.0") == "2.13.0"


@pytest.mark.parametrize("name", ["nvidia-cublas-cu12", "nvidia_nccl", "triton", "cuda-toolkit", "cuda-bindings"])
def test_env_knows_cuda_packages(env_script, name):
    plan = {"install": [{"metadata": {"name": n}} for n in ("torch", "numpy", name)]}
    assert env_script.cuda_packages(json.dumps(plan)) == [name]
