"""The model repository: its configuration read back, its files, its Python backend, and what is refused."""

import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import pytest

import compress_uq as cuq
from compress_uq.errors import ArtifactError, InputError, UnknownNameError
from compress_uq.export.triton_config import to_text
from compress_uq.runtime import OnnxPredictor
from small_models import decided_model

SHAPE, LABELS = (1, 8, 8), ("left", "right", "straight on", "stop\nsign")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for sampling in ("fixed", "seeded", "random"):
        cuq.export_onnx(decided_model(SHAPE, LABELS), folder / f"{sampling}.onnx", sampling=sampling)
    return folder


def parse(text: str) -> dict:
    """Protobuf's text format into lists of values by name; words of enumerations stay words."""
    tokens = re.findall(r'"(?:\\.|[^"\\])*"|[{}\[\]:,]|[^\s{}\[\]:,"]+', text)

    def value(token):
        if token.startswith('"'):
            return re.sub(r"\\(.)", r"\1", token[1:-1])
        return {"true": True, "false": False}.get(token, int(token) if token.lstrip("-").isdigit() else token)

    def message(place):
        found: dict = {}
        while place < len(tokens) and tokens[place] != "}":
            name, place = tokens[place], place + 1
            if tokens[place] == "{":
                inner, place = message(place + 1)
                found.setdefault(name, []).append(inner)
            else:
                assert tokens[place] == ":"
                place += 1
                if tokens[place] == "[":
                    end = tokens.index("]", place)
                    found.setdefault(name, []).extend(value(t) for t in tokens[place + 1 : end] if t != ",")
                    place = end
                else:
                    found.setdefault(name, []).append(value(tokens[place]))
            place += 1
        return found, place

    found, end = message(0)
    assert end == len(tokens)
    return found


def config(folder: Path) -> dict:
    return parse((folder / "config.pbtxt").read_text())


def test_the_default_repository(files, tmp_path):
    result = cuq.export_triton(files / "fixed.onnx", tmp_path / "repository")
    folder = tmp_path / "repository" / "classifier"
    assert result.path == folder
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        "1/model.onnx", "config.pbtxt", "labels.txt"
    ]  # fmt: skip
    assert result.size_bytes == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert (folder / "1" / "model.onnx").read_bytes() == (files / "fixed.onnx").read_bytes()
    assert (folder / "labels.txt").read_text().splitlines() == ["left", "right", "straight on", "stop sign"]
    found = config(folder)
    flat = {"dims": [1], "reshape": [{"shape": []}]}
    warm = {"key": ["images"], "value": [{"data_type": ["TYPE_FP32"], "dims": [*SHAPE], "zero_data": [True]}]}
    assert found == {
        "name": ["classifier"],
        "backend": ["onnxruntime"],
        "max_batch_size": [32],
        "input": [{"name": ["images"], "data_type": ["TYPE_FP32"], "dims": [1, 8, 8]}],
        "output": [
            {"name": ["probabilities"], "data_type": ["TYPE_FP32"], "dims": [4], "label_filename": ["labels.txt"]},
            {"name": ["label"], "data_type": ["TYPE_INT64"], **flat},
            *({"name": [name], "data_type": ["TYPE_FP32"], **flat}
              for name in "confidence uncertainty entropy mutual_information variance ood_score".split()),
            {"name": ["accepted"], "data_type": ["TYPE_BOOL"], **flat},
            {"name": ["prediction_set"], "data_type": ["TYPE_BOOL"], "dims": [4]},
        ],
        "instance_group": [{"count": [1], "kind": ["KIND_AUTO"]}],
        "dynamic_batching": [{"max_queue_delay_microseconds": [1000]}],
        "model_warmup": [
            {"name": [f"batch of {n}"], "batch_size": [n], "inputs": [warm]} for n in (1, 32)
        ],
    }  # fmt: skip


def test_the_configuration_agrees_with_the_graph(files, tmp_path):
    """Against the file itself, read by onnx: what Triton compares when it loads the model."""
    cuq.export_triton(files / "seeded.onnx", tmp_path)
    found, graph = config(tmp_path / "classifier"), onnx.load(files / "seeded.onnx").graph
    names = {1: "TYPE_FP32", 7: "TYPE_INT64", 9: "TYPE_BOOL"}
    for declared, values in ((found["input"], graph.input), (found["output"], graph.output)):
        assert len(declared) == len(values)
        for given, value in zip(declared, values, strict=True):
            axes = [axis.dim_value for axis in value.type.tensor_type.shape.dim[1:]]
            assert given["name"] == [value.name]
            assert given["data_type"] == [names[value.type.tensor_type.elem_type]]
            assert (given["reshape"][0]["shape"] if "reshape" in given else given["dims"]) == axes
    assert found["input"][1] == {
        "name": ["seed"], "data_type": ["TYPE_INT64"], "dims": [1], "reshape": [{"shape": []}]
    }  # fmt: skip
    assert [i["key"] for i in found["model_warmup"][0]["inputs"]] == [["images"], ["seed"]]


def test_every_option_is_in_the_configuration(files, tmp_path):
    options = cuq.TritonOptions(
        name="m.2-b_c", max_batch_size=64, preferred_batch_sizes=(8, 16), queue_delay=0, instances=3, instance_kind="gpu",
        tensorrt=True, tensorrt_cache='/var/a "cache"', warm_up=False,
    )  # fmt: skip
    cuq.export_triton(files / "seeded.onnx", tmp_path, options=options)
    found = config(tmp_path / "m.2-b_c")
    assert found["name"] == ["m.2-b_c"]
    assert found["max_batch_size"] == [64]
    assert found["dynamic_batching"] == [{"max_queue_delay_microseconds": [0], "preferred_batch_size": [8, 16]}]
    assert found["instance_group"] == [{"count": [3], "kind": ["KIND_GPU"]}]
    assert "model_warmup" not in found
    (accelerator,) = found["optimization"][0]["execution_accelerators"][0]["gpu_execution_accelerator"]
    assert accelerator["name"] == ["tensorrt"]
    assert {p["key"][0]: p["value"][0] for p in accelerator["parameters"]} == {
        "trt_profile_min_shapes": "images:1x1x8x8,seed:1",
        "trt_profile_opt_shapes": "images:16x1x8x8,seed:16",
        "trt_profile_max_shapes": "images:64x1x8x8,seed:64",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": '/var/a "cache"',
    }


def test_text_format():
    assert to_text({"a": [], "b": [{"c": [1, 2]}, {}], "d": True, "e": 'x"\\'}) == (
        'a: []\nb {\n  c: [1, 2]\n}\nb {\n}\nd: true\ne: "x\\"\\\\"\n'
    )


def test_a_file_without_labels(tmp_path):
    cuq.export_onnx(decided_model(SHAPE, None), tmp_path / "m.onnx")
    cuq.export_triton(tmp_path / "m.onnx", tmp_path / "repository")
    assert not (tmp_path / "repository" / "classifier" / "labels.txt").exists()
    assert "label_filename" not in (tmp_path / "repository" / "classifier" / "config.pbtxt").read_text()


@pytest.fixture
def python_model(files, tmp_path, monkeypatch):
    """The model.py of the Python backend, loaded as Triton loads it, beside stand-ins for Triton's classes."""
    cuq.export_triton(files / "seeded.onnx", tmp_path, options=cuq.TritonOptions(backend="python"))
    folder = tmp_path / "classifier"
    assert config(folder)["backend"] == ["python"]

    class Held:
        def __init__(self, *values, **named):
            self.values, self.named = values, named

        def as_numpy(self):
            return self.values[1]

    backend = types.ModuleType("triton_python_backend_utils")
    error = type("TritonError", (Held,), {"INVALID_ARG": "invalid"})
    for name, value in {
        "Tensor": Held, "InferenceResponse": Held, "TritonError": error, "TritonModelException": RuntimeError,
        "get_input_tensor_by_name": lambda request, name: Held(name, request[name]),
    }.items():  # fmt: skip
        setattr(backend, name, value)
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    module: dict = {}
    exec(compile((folder / "1" / "model.py").read_text(), "model.py", "exec"), module)
    model = module["TritonPythonModel"]()
    model.place = {"model_repository": str(folder), "model_version": "1", "model_instance_device_id": "0"}
    return model


def test_the_python_backend_runs_a_batch_at_once(files, python_model):
    python_model.initialize({**python_model.place, "model_instance_kind": "CPU"})
    runs, real = [], python_model.session.run
    python_model.session = types.SimpleNamespace(
        run=lambda _, feed: (runs.append(len(feed["images"])), real(None, feed))[1]
    )
    random = np.random.default_rng(0)
    requests = [
        {"images": random.normal(size=(n, *SHAPE)).astype(np.float32), "seed": random.integers(0, 99, n)}
        for n in (3, 1, 2)
    ]
    requests[1]["images"][0, 0, 2, 2] = np.nan
    responses = python_model.execute(requests)
    assert runs == [5]
    assert "NaN" in responses[1].named["error"].values[0]
    predictor = OnnxPredictor(files / "seeded.onnx")
    for place in (0, 2):
        got = {t.values[0]: t.values[1] for t in responses[place].named["output_tensors"]}
        wanted = predictor(**requests[place])._asdict()
        assert list(got) == list(wanted)
        for name, value in wanted.items():
            assert got[name].dtype == value.dtype
            assert np.allclose(got[name], value, atol=1e-6), name
    assert python_model.execute([requests[1]])[0].named["error"]
    assert runs == [5]


def test_the_python_backend_names_a_missing_gpu_provider(python_model, monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(RuntimeError, match="onnxruntime-gpu"):
        python_model.initialize({**python_model.place, "model_instance_kind": "GPU"})


def test_other_models_stay_and_nothing_is_replaced_unasked(files, tmp_path):
    for name in ("a", "b"):
        cuq.export_triton(files / "fixed.onnx", tmp_path, options=cuq.TritonOptions(name=name))
    before = (tmp_path / "a" / "config.pbtxt").read_bytes()
    with pytest.raises(ArtifactError, match="--overwrite"):
        cuq.export_triton(files / "seeded.onnx", tmp_path, options=cuq.TritonOptions(name="a"))
    assert (tmp_path / "a" / "config.pbtxt").read_bytes() == before
    cuq.export_triton(files / "seeded.onnx", tmp_path, options=cuq.TritonOptions(name="a"), overwrite=True)
    assert len(config(tmp_path / "a")["input"]) == 2
    assert len(config(tmp_path / "b")["input"]) == 1
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    with pytest.raises(ArtifactError, match="not a Triton model"):
        cuq.export_triton(files / "fixed.onnx", tmp_path, options=cuq.TritonOptions(name="photos"), overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "photos"]


def test_nothing_half_written_lies_in_the_repository(files, tmp_path, monkeypatch):
    """A server takes every folder in it for a model, and does not start when one cannot be loaded."""
    repository, seen = tmp_path / "repository", []
    real = Path.write_bytes

    def write_bytes(path, data):
        seen.append({p.name for p in repository.iterdir()})
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    for expected in (set(), {"classifier"}):
        seen.clear()
        cuq.export_triton(files / "fixed.onnx", repository, overwrite=True)
        assert len(seen) == 3
        assert all(names == expected for names in seen)
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ArtifactError, match="No space left"):
        cuq.export_triton(files / "fixed.onnx", repository, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["repository"]
    assert [p.name for p in repository.iterdir()] == ["classifier"]


def test_a_repository_that_cannot_be_written_to_from_outside(files, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    cuq.export_triton(files / "fixed.onnx", tmp_path / "repository")
    assert [p.name for p in (tmp_path / "repository").iterdir()] == ["classifier"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name": "../elsewhere"}, InputError, "elsewhere"),
        ({"name": ""}, InputError, "letters"),
        ({"backend": "onnx"}, UnknownNameError, "onnxruntime"),
        ({"instance_kind": "tpu"}, UnknownNameError, "tpu"),
        ({"max_batch_size": 0}, InputError, "at least 1"),
        ({"instances": 0}, InputError, "at least 1"),
        ({"queue_delay": -1}, InputError, "at least 0"),
        ({"preferred_batch_sizes": (8, 33)}, InputError, "33"),
        ({"tensorrt": True, "backend": "python"}, InputError, "onnxruntime backend"),
        ({"tensorrt": True, "instance_kind": "cpu"}, InputError, "GPU"),
        ({"tensorrt_cache": "/c"}, InputError, "without tensorrt"),
    ],
)
def test_impossible_options(files, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        cuq.export_triton(files / "fixed.onnx", tmp_path / "r", options=cuq.TritonOptions(**options))
    assert not list(tmp_path.iterdir())


def test_files_that_are_refused(files, tmp_path):
    (tmp_path / "cut.onnx").write_bytes((files / "fixed.onnx").read_bytes()[:500])
    for name in ("cut.onnx", "none.onnx"):
        with pytest.raises(ArtifactError):
            cuq.export_triton(tmp_path / name, tmp_path / "r")
    with pytest.raises(InputError, match="would draw the same samples"):
        cuq.export_triton(files / "random.onnx", tmp_path / "r", options=cuq.TritonOptions(instances=2))
    assert not (tmp_path / "r").exists()
    cuq.export_triton(files / "random.onnx", tmp_path / "r")


def test_a_bundle_is_served_in_another_form(bundle_folder, tmp_path):
    bundle = cuq.Bundle.load(bundle_folder)
    as_it_is = bundle.export_triton(tmp_path / "a").path
    assert (as_it_is / "1" / "model.onnx").read_bytes() == bundle.onnx
    unrolled = bundle.export_triton(tmp_path / "b", sampling="seeded", layout="unroll").path
    text = (unrolled / "config.pbtxt").read_text()
    assert 'name: "seed"' in text
    recorded = {entry.key: json.loads(entry.value) for entry in onnx.load(unrolled / "1" / "model.onnx").metadata_props}
    assert recorded["compress_uq.layout"] == "unroll"


def test_the_command(command, bundle_folder, tmp_path):
    code, out, err = command("export", bundle_folder, "--to", "triton", "--out", "r", "--name", "digits", "--json")
    assert code == 0, err
    assert '"gates"' in out
    served = tmp_path / "r" / "digits"
    assert (served / "1" / "model.onnx").read_bytes() == (bundle_folder / "model.onnx").read_bytes()
    line = (
        "--to triton --out r --name digits --sampling seeded --preferred-batch-sizes 4,8 --backend python --no-warm-up"
    )
    assert command("export", bundle_folder, *line.split())[0] == 2
    assert command("export", bundle_folder, *line.split(), "--overwrite")[0] == 0
    found = config(served)
    assert [i["name"] for i in found["input"]] == [["images"], ["seed"]]
    assert found["dynamic_batching"][0]["preferred_batch_size"] == [4, 8]
    assert "model_warmup" not in found
    assert command("export", bundle_folder / "model.onnx", "--to", "triton", "--out", "r", "--name", "again")[0] == 0
    for wrong, message in (
        ("--to triton --out r --sampling seeded --name x", "give its bundle"),
        ("--to triton --out r --preferred-batch-sizes 4;8", "4;8"),
        ("--to tritn --out r", "'triton'"),
        ("--out m.onnx --max-batch-size 8", "--to triton"),
    ):
        code, _, err = command("export", bundle_folder / "model.onnx", *wrong.split())
        assert code == 2
        assert message in err, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r"]
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["again", "digits"]
