"""The house: layers, one door for each heavy library, the public names, and no torch where none is needed."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import compress_uq as cuq

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sdk" / "compress_uq"

# A module imports from its own package and from lower layers only.
LAYERS = [
    {"_version", "errors", "types", "progress"},
    {"registry", "storage", "runtime"},
    {"fitted", "footprint"},
    {"batch_norm", "config", "cost", "models", "metrics"},
    {"data"},
    {"stages", "predict", "training"},
    {"pruning", "uq", "calibration", "scores", "decisions"},
    {"uncertain", "structure"},
    {"steps", "report"},
    {"choosing", "deciding", "stored"},
    {"shrinking", "held_out", "finishing", "export"},
    {"search", "compression"},
    {"layer_sensitivity", "planning"},
    {"bundle", "listing", "inputs", "recipe"},
    {"verification", "pipeline", "measuring"},
    {"study", "recalibration"},
]
HEIGHT = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}
DOORS = {
    "torch_pruning": {"pruning"},
    "netcal": {"calibration"},
    "onnx": {"export"},
    "onnxruntime": {"runtime"},
    "onnxscript": {"export"},
    "typer": set(),
    "rich": set(),
    "matplotlib": {"measuring", "report", "study"},
    "timm": {"models"},
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
    return found


SOURCES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_import_from_lower_layers_only(path):
    here = room_of(path)
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "compress_uq" and rest:
            other = rest.partition(".")[0]
            assert other == here or HEIGHT[other] < HEIGHT[here], f"{here} imports {other}"
        elif top in DOORS:
            assert here in DOORS[top], f"{here} imports {top}"
        assert top != "compress_uq_cli"


def test_every_room_has_a_layer():
    assert {room_of(p) for p in SOURCES} == set(HEIGHT)


@pytest.mark.parametrize("path", sorted((ROOT / "cli").rglob("*.py")), ids=lambda p: p.name)
def test_the_command_line_uses_the_public_api_only(path):
    for name in imports(path):
        assert not name.startswith("compress_uq.")


def test_public_names():
    assert sorted(cuq.__all__) == cuq.__all__
    for name in cuq.__all__:
        assert getattr(cuq, name) is not None
    assert set(cuq.__all__) <= set(dir(cuq))
    promised = """Bundle OnnxPredictor Prediction Splits TrainingConfig UncertainModel build_model calibrate compress
        evaluate export_onnx finetune fit_uncertainty load_model metrics prepare_uncertainty prune save_model uq verify"""
    assert set(promised.split()) <= set(cuq.__all__)
    with pytest.raises(AttributeError, match="no_such"):
        cuq.no_such  # noqa: B018


@pytest.mark.parametrize(
    "module",
    [
        "metrics",
        "uq",
        "pruning",
        "calibration",
        "scores",
        "decisions",
        "models",
        "data",
        "export",
        "report",
        "measuring",
    ],
)
def test_every_public_object_has_a_docstring(module):
    loaded = importlib.import_module(f"compress_uq.{module}")
    for name in loaded.__all__:
        if inspect.isclass(getattr(loaded, name)) or inspect.isfunction(getattr(loaded, name)):
            assert getattr(loaded, name).__doc__, name


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("line", ["import compress_uq.runtime", "import compress_uq; compress_uq.OnnxPredictor"])
def test_the_runtime_needs_no_torch(line):
    heavy = "torch onnx sklearn scipy matplotlib typer rich netcal safetensors".split()
    code = f"import sys; {line}; print([m for m in {heavy!r} if m in sys.modules])"
    done = run(code)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_command_line_starts_without_torch():
    done = run("import sys; import compress_uq_cli.main; print('torch' in sys.modules, 'numpy' in sys.modules)")
    assert done.stdout.strip() == "False False", done.stderr


def test_every_entry_has_a_summary_and_names_are_those_of_the_contract():
    listed = cuq.catalogue()
    for kind, entries in listed.items():
        for entry in entries:
            assert entry["summary"], (kind, entry)
    names = {kind: [e["name"] for e in entries] for kind, entries in listed.items()}
    assert names["criteria"] == "random l1 l2 bn hrank taylor fpgm lamp hessian loss resrep".split()
    assert set(names["uq"]) <= set("msp mc-dropout ensemble tradi swag gaussian laplace mask-ensemble".split())
    assert set(names["calibrators"]) <= set("none temperature vector dirichlet histogram isotonic beta".split())
    assert names["architectures"] == ["mlp", "cnn", "resnet20", "resnet56", "resnet18", "vgg19"]
    reported = "accuracy nll brier ece ause ause_exact aurc error_auroc accuracy_at_50 f1_macro ood_auroc"
    assert names["metrics"] == reported.split()
    assert all(e["source"] for e in listed["criteria"] + listed["schedules"] + listed["uq"])
    assert names["schedules"] == ["one-shot", "iterative", "lottery"]


def test_no_public_function_has_a_modules_name():
    homes = {name: value for name, value in cuq._HOME.items() if (PACKAGE / f"{name}.py").exists()}
    assert not homes, "importing the module would put it in the function's place"
