"""Timing side by side: what is compared with what, on which provider, and what is left out."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import compress_uq as cuq
from compress_uq import runtime
from compress_uq.cost import Cost, interleaved_times
from compress_uq.errors import InputError, MissingDependencyError
from compress_uq.measuring import EagerLoop, run
from compress_uq.stages import Origin
from compress_uq.uncertain import UncertainModel
from compress_uq.uq import MCDropout, Trained

SHAPE = (1, 8, 8)
CPU = "CPUExecutionProvider"
ROWS = ["dense, one pass", "dense, eager loop", "floor", "compressed, fp32, fold", "compressed, fp32, unroll"]


def convolutions(width) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, 4)
    ).eval()


@pytest.fixture(scope="module")
def model() -> UncertainModel:
    origin = Origin(SHAPE, Cost(1, 10**12, 1))
    method = MCDropout(p=0.2, samples=6, at=("3",))
    return UncertainModel(method.fit(Trained((convolutions(8),), origin)), method, origin)


@pytest.fixture(scope="module")
def result(model) -> cuq.Benchmark:
    return cuq.benchmark(model, dense=convolutions(16), batch_sizes=(4,), rounds=6)


def test_every_alternative_has_its_figures(result):
    assert [row.name for row in result.rows] == ROWS
    assert result.samples == 6
    assert not result.failures
    assert not result.notes
    for row in result.rows:
        assert 0 < row.p50_ms <= row.p90_ms <= row.p99_ms
        assert row.images_per_second == pytest.approx(1000 * row.batch / row.p50_ms)
        assert (row.to_floor is not None) == row.name.startswith("compressed")
        assert row.to_dense.low <= row.to_dense.median <= row.to_dense.high
        assert (row.peak_bytes is None) == (row.name == "floor")
    dense, eager = (result.find(name, 4) for name in ROWS[:2])
    assert dense.to_dense.median == 1
    assert dense.rounds == 6
    assert eager.to_dense.median > 6, "six eager passes cost more than one"
    assert eager.peak_bytes > dense.peak_bytes > 2 * 10**7, "torch takes more than onnxruntime"


def test_table_json_and_picture(result, tmp_path):
    assert all(len(line) == len(result.columns) for line in result.table())
    result.save(tmp_path / "b")
    content = json.loads((tmp_path / "b" / "benchmark.json").read_text())
    assert len(content["rows"]) == len(ROWS)
    assert content["environment"]["torch"] == torch.__version__
    assert (tmp_path / "b" / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert "| floor | cpu | 1 | 4 |" in (tmp_path / "b" / "benchmark.md").read_text()
    with pytest.raises(KeyError, match="batch 5"):
        result.find("floor", 5)


def test_the_eager_loop_drops(model):
    loop = EagerLoop(convolutions(16), model.members)
    x = torch.ones(2, *SHAPE)
    assert not torch.equal(loop(x), loop(x))
    assert torch.allclose(loop(x).sum(1), torch.ones(2))


def test_rounds_are_taken_in_turns():
    said = []
    runs = {name: lambda name=name: said.append(name) for name in "ab"}
    ticks = iter(range(100))
    times = interleaved_times(runs, rounds=4, sparse={"b": 3}, clock=lambda: next(ticks))
    assert said == list("ab" + "ab" + "a" + "a" + "ab")
    assert times["a"] == [1000.0] * 4
    assert [math.isnan(t) for t in times["b"]] == [False, True, True, False]


# Providers.


class OnCpu:
    """A session that runs on the CPU whatever was asked for, as onnxruntime does in silence."""

    def __init__(self, model, options, providers, enable_fallback):
        self.real = runtime._REAL(model, runtime.onnxruntime.SessionOptions(), providers=[CPU])

    def __getattr__(self, name):
        return getattr(self.real, name)


@pytest.fixture
def pretended(monkeypatch):
    """An onnxruntime that lists a GPU provider."""
    monkeypatch.setattr(runtime, "_REAL", runtime.onnxruntime.InferenceSession, raising=False)
    listed = ["CUDAExecutionProvider", CPU]
    monkeypatch.setattr(runtime.onnxruntime, "get_available_providers", lambda: listed)

    def use(sessions):
        monkeypatch.setattr(runtime.onnxruntime, "InferenceSession", sessions)

    return use


class InPart(OnCpu):
    """A session of a provider that starts, and leaves nodes to the CPU where it may."""

    def __init__(self, model, options, providers, enable_fallback):
        if not enable_fallback:
            raise RuntimeError("graph nodes are assigned to it, but fallback to CPU EP has been explicitly disabled")
        super().__init__(model, options, providers, enable_fallback)
        self.get_providers = lambda: providers


ON_CUDA = {"providers": ["cuda", "cpu"], "batch_sizes": (1,), "layouts": ["fold"], "rounds": 3, "memory": False}


@pytest.fixture
def in_part(pretended):
    real = runtime.onnxruntime.InferenceSession
    pretended(lambda *a, providers, **k: (InPart if providers[0] != CPU else real)(*a, providers=providers, **k))


def test_leaving_a_part_to_the_cpu_is_a_failure(in_part, model):
    timed = cuq.benchmark(model, **ON_CUDA)
    on_cuda = [row for row in timed.rows if row.provider == "cuda"]
    assert [row.name for row in on_cuda] == ["floor: trunk", "floor: tail", "compressed, fp32, fold"]
    assert all("to the CPU" in row.failure and row.p50_ms is None for row in on_cuda)
    assert [row.name for row in timed.rows if row.p50_ms] == ["floor", "compressed, fp32, fold"]
    assert "failed: CUDAExecutionProvider leaves" in timed.to_markdown()
    assert timed.to_png()
    assert timed.notes[0].startswith("the dense model is not at hand")


def test_the_command_ends_with_two_when_rows_failed(in_part, command, bundle_folder, tmp_path):
    line = "--providers cuda,cpu --batch-sizes 1 --layout fold --rounds 3 --out timed --json"
    code, out, err = command("benchmark", bundle_folder, *line.split())
    assert code == 2
    assert "rows were not timed, the first dense, one pass on cuda: CUDAExecutionProvider leaves" in err
    assert [row["failure"] is None for row in json.loads(out)["rows"] if row["provider"] == "cpu"] == [True] * 4
    assert (tmp_path / "timed" / "benchmark.md").is_file()


def test_a_provider_that_does_not_start_is_refused(pretended, model):
    pretended(OnCpu)
    with pytest.raises(MissingDependencyError, match="'CUDAExecutionProvider' is installed and does not start"):
        cuq.benchmark(model, **ON_CUDA)
    with pytest.raises(MissingDependencyError, match="'TensorrtExecutionProvider' is not there: onnxruntime has CUDA"):
        cuq.benchmark(model, **{**ON_CUDA, "providers": ["tensorrt"]})


def test_leaving_nodes_to_the_cpu_is_a_failure(pretended):
    def refuses(content, options, providers, enable_fallback):
        assert not enable_fallback
        assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
        raise RuntimeError("graph nodes are assigned to it, but fallback to CPU EP has been explicitly disabled")

    pretended(refuses)
    with pytest.raises(MissingDependencyError, match="leaves the graph, or a part of it, to the CPU"):
        runtime.session(b"", providers=["CUDAExecutionProvider"], fallback=False)


# What cannot be.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_sizes": (0,)}, "batch sizes 0"),
        ({"threads": ()}, "threads none"),
        ({"rounds": 0}, "rounds 0"),
        ({"precisions": ["fp8"]}, "unknown precision 'fp8'"),
        ({"precisions": []}, "nothing to time"),
        ({"layouts": ["folded"]}, "unknown layout 'folded'"),
        ({"providers": ["npu"]}, "unknown provider 'npu'"),
        ({"clock": "sun"}, "unknown clock 'sun'"),
        ({"clock": "cpu", "threads": (2,)}, "expected threads 1"),
        ({"precisions": ["int8"]}, "takes its ranges from images"),
    ],
)
def test_wrong_inputs(model, options, said):
    with pytest.raises(InputError, match=said):
        cuq.benchmark(model, **options)


def test_another_architecture_is_refused(model):
    with pytest.raises(InputError, match="no 3, where the compressed one drops"):
        cuq.benchmark(model, dense=nn.Sequential(nn.Flatten(), nn.Linear(64, 4)))
    with pytest.raises(InputError, match=r"does not run on images \(1, 8, 8\)"):
        cuq.benchmark(model, dense=nn.Sequential(*convolutions(8)[:4], nn.Flatten(), nn.Linear(9, 4)))


# Bundles and the command line.


def test_a_bundle_without_its_model_is_timed_as_a_file(bundle_folder):
    bundle = cuq.Bundle.load(bundle_folder)
    structure = json.loads(bundle.files["structure.json"]) | {"architecture": None}
    files = {**bundle.files, "structure.json": json.dumps(structure).encode()}
    timed = cuq.benchmark(replace(bundle, uncertain=None, files=files), batch_sizes=(2,), rounds=3, memory=False)
    assert [row.name for row in timed.rows] == ["compressed, fp32, fold"]
    assert len(timed.notes) == 2
    assert "only model.onnx" in timed.notes[1]


def test_the_command(command, bundle_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_peak", lambda *_: 10**8)  # measured above
    out = tmp_path / "timed"
    line = ["benchmark", bundle_folder, "--batch-sizes", "2", "--rounds", "3", "--layout", "fold", "--out", out]
    code, printed, err = command(*line, "--clock", "cpu", "--json")
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads(printed)["rows"]}
    assert list(rows) == ROWS[:4]
    assert rows["compressed, fp32, fold"]["to_floor"]["median"] > 0
    assert "to one dense pass" in err
    assert (out / "benchmark.png").is_file()
    code, _, err = command(*line)
    assert code == 2
    assert "benchmark.json exists: pass --overwrite" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--batch-sizes 1,x", "--batch-sizes '1,x'"),
        ("--precision fp8", "unknown precision 'fp8'"),
        ("--dense nothing.pt", "nothing.pt"),
        ("--threads 2 --clock cpu", "one thread"),
    ],
)
def test_wrong_lines(command, bundle_folder, options, said):
    code, _, err = command("benchmark", bundle_folder, *options.split())
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


def test_methods_lists_them():
    listed = {kind: [e["name"] for e in entries] for kind, entries in cuq.catalogue().items()}
    assert listed["precisions"] == ["fp32", "fp16", "int8"]
    assert listed["quantizations"] == ["cpu", "tensorrt"]
    assert listed["layouts"] == ["fold", "unroll"]
    assert listed["inputs"] == ["float32-nchw", "uint8-nhwc"]
    assert listed["exporters"] == ["onnx", "triton"]
