"""Architectures and model files: what loads, what is refused, and that nothing runs code unasked."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

import compress_uq as cuq
from compress_uq.errors import ArtifactError, MissingDependencyError, ModelError, UnknownNameError
from compress_uq.models import ChannelSelect
from small_models import Leaves, own


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet20", 269_722), ("resnet56", 853_018), ("resnet18", 11_173_962), ("vgg19", 20_040_522)],
)
def test_sizes_of_the_published_networks(name, parameters):
    assert sum(p.numel() for p in own(name).parameters()) == parameters


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "vgg19", "cnn", "mlp"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_own_architectures_take_any_shape_and_class_count(name, shape):
    model = cuq.build_model(f"compress-uq:{name}", num_classes=7, input_shape=shape).eval()
    assert model(torch.randn(2, *shape)).shape == (2, 7)


def test_widths_and_depths():
    mlp = own("mlp", (1, 28, 28), widths=(128, 64))
    assert [tuple(p.shape) for p in mlp.parameters() if p.ndim == 2] == [(128, 784), (64, 128), (10, 64)]
    cnn = own("cnn", (1, 28, 28), widths=(64, 64), kernel_size=5)
    assert [tuple(p.shape) for p in cnn.parameters() if p.ndim == 4] == [(64, 1, 5, 5), (64, 64, 5, 5)]


def test_option_a_shortcut_pads_with_zero_channels():
    select = ChannelSelect(4, 8, 2)
    x = torch.randn(1, 4, 6, 6)
    y = select(x)
    assert y.shape == (1, 8, 3, 3)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert y[:, :2].abs().sum() == y[:, 6:].abs().sum() == 0
    select.remove_inputs([1])
    select.remove_outputs([0, 2])
    z = select(x[:, [0, 2, 3]])
    assert torch.equal(z[:, 1:2] * 0, z[:, 1:2])
    assert torch.equal(z[:, 2], x[:, 2, ::2, ::2])


@pytest.mark.parametrize(
    ("name", "suffix", "top1"), [("resnet20", "12fca82f", 0.9173), ("resnet56", "4bfd9763", 0.9339)]
)
def test_public_weights_load_and_score(real_data, real_data_module, name, suffix, top1):
    model = cuq.load_model(
        real_data / "weights" / f"cifar10_{name}-{suffix}.th", arch=f"compress-uq:{name}", num_classes=10
    )
    pixels, labels = real_data_module.cifar10(train=False)
    count = 1000
    images = cuq.data.ImageTensors(
        torch.from_numpy(pixels[:count]).permute(0, 3, 1, 2), torch.from_numpy(labels[:count]),
        (0.485, 0.456, 0.406), (0.229, 0.224, 0.225),
    )  # fmt: skip
    accuracy = cuq.evaluate(model, cuq.Splits(test=images)).metrics["accuracy"]
    assert accuracy.low <= top1 <= accuracy.high


def test_checkpoint_round_trip(tmp_path):
    model = own("cnn", (1, 8, 8), widths=(8,)).eval()
    record = cuq.models.DataRecord("digits", "f", (3, 5))
    cuq.save_model(
        model, tmp_path / "m.pt", arch="compress-uq:cnn", num_classes=10, input_shape=(1, 8, 8),
        options={"widths": [8]}, labels=list("0123456789"), mean=(0.3,), std=(0.4,), data=record,
    )  # fmt: skip
    back = cuq.read_checkpoint(tmp_path / "m.pt")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(back.model(x), model(x))
    assert (back.mean, back.std, back.data, back.input_shape) == ((0.3,), (0.4,), record, (1, 8, 8))
    assert back.labels == tuple("0123456789")
    torch.load(tmp_path / "m.pt", weights_only=True)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "best_prec1": 0.5},
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
    ],
)
def test_state_dicts_in_their_wrappings(tmp_path, wrap):
    model = own("mlp", (1, 8, 8)).eval()
    torch.save(wrap(model.state_dict()), tmp_path / "m.pth")
    back = cuq.load_model(tmp_path / "m.pth", arch="compress-uq:mlp", input_shape=(1, 8, 8))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(back(x), model(x))


def test_safetensors(tmp_path):
    model = own("mlp", (1, 8, 8)).eval()
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    back = cuq.load_model(tmp_path / "m.safetensors", arch="compress-uq:mlp", input_shape=(1, 8, 8))
    assert torch.equal(back(torch.ones(1, 1, 8, 8)), model(torch.ones(1, 1, 8, 8)))
    (tmp_path / "bad.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ModelError, match="not a safetensors file"):
        cuq.load_model(tmp_path / "bad.safetensors", arch="compress-uq:mlp")


class Bomb:
    """An object whose unpickling leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_runs_nothing_unless_asked(tmp_path):
    trace = tmp_path / "trace"
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps({"state_dict": Bomb(trace)}))
    torch.save({"x": Bomb(trace)}, tmp_path / "bomb2.pt")
    for name in ("bomb.pt", "bomb2.pt"):
        with pytest.raises(ModelError):
            cuq.load_model(tmp_path / name, arch="compress-uq:mlp")
    assert not trace.exists()


def test_a_whole_module_only_with_the_flag(tmp_path):
    torch.save(Leaves(), tmp_path / "whole.pt")
    with pytest.raises(ModelError, match="--unsafe-load"):
        cuq.load_model(tmp_path / "whole.pt")
    assert isinstance(cuq.load_model(tmp_path / "whole.pt", unsafe=True), Leaves)


def test_what_does_not_fit_is_named_with_both_shapes(tmp_path):
    torch.save(own("mlp", (1, 8, 8), widths=(32,)).state_dict(), tmp_path / "m.pt")
    with pytest.raises(ModelError, match=r"1.weight is \(32, 64\) in the file and \(128, 64\) in the model"):
        cuq.load_model(tmp_path / "m.pt", arch="compress-uq:mlp", input_shape=(1, 8, 8))
    with pytest.raises(ModelError, match=r"0.weight .* is not in the file"):
        cuq.load_model(tmp_path / "m.pt", arch="compress-uq:cnn", input_shape=(1, 8, 8))
    with pytest.raises(ModelError, match="pass --arch"):
        cuq.load_model(tmp_path / "m.pt")


def test_damaged_weights_and_files(tmp_path):
    state = own("mlp", (1, 8, 8)).state_dict()
    state["1.bias"][3] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(ModelError, match=r"1.bias holds NaN"):
        cuq.load_model(tmp_path / "nan.pt", arch="compress-uq:mlp", input_shape=(1, 8, 8))
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"epoch": 3}, tmp_path / "nothing.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("text.pt", "empty.pt", "nothing.pt", "list.pt", "missing.pt"):
        with pytest.raises(ModelError, match=name):
            cuq.load_model(tmp_path / name, arch="compress-uq:mlp")


@pytest.mark.parametrize(
    ("arch", "error", "message"),
    [
        ("resnet20", ModelError, "compress-uq:NAME"),
        ("compress-uq:resnet21", UnknownNameError, "did you mean 'resnet20'"),
        ("torchvision:resnet19", UnknownNameError, "did you mean"),
        ("no_such_package:net", ModelError, "cannot be imported"),
        ("small_models:nothing", ModelError, "nothing"),
        ("small_models:PRUNABLE", ModelError, "expected a callable"),
        ("small_models:own", ModelError, "cannot be built"),
        ("small_models:no_model", ModelError, "expected a torch.nn.Module"),
    ],
)
def test_references_that_build_nothing(arch, error, message):
    with pytest.raises(error, match=message):
        cuq.build_model(arch, num_classes=10)


def test_references_that_build():
    assert isinstance(cuq.build_model("small_models:Leaves", num_classes=4), Leaves)
    assert cuq.build_model("torchvision:resnet18", num_classes=4, input_shape=(3, 8, 8)).fc.out_features == 4
    with pytest.raises(ModelError, match="at least two classes"):
        cuq.build_model("compress-uq:mlp", num_classes=1)
    with pytest.raises(ModelError, match="cannot be built"):
        cuq.build_model("compress-uq:mlp", num_classes=3, options={"depth": 3})


def test_timm(monkeypatch):
    timm = pytest.importorskip("timm")
    assert timm.is_model("resnet18")
    model = cuq.build_model("timm:resnet18", num_classes=5, input_shape=(1, 32, 32)).eval()
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 5)
    with pytest.raises(UnknownNameError, match="timm"):
        cuq.build_model("timm:resnet18x", num_classes=5)
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(MissingDependencyError, match=r"compress-uq\[timm\]"):
        cuq.build_model("timm:resnet18", num_classes=5)


def test_a_checkpoint_never_imports_by_itself(tmp_path):
    cuq.save_model(Leaves(4), tmp_path / "m.pt", arch="small_models:Leaves", num_classes=4)
    with pytest.raises(ModelError, match="pass --arch small_models:Leaves if you trust it"):
        cuq.read_checkpoint(tmp_path / "m.pt")
    assert isinstance(cuq.load_model(tmp_path / "m.pt", arch="small_models:Leaves"), Leaves)


def test_unwritable_places(tmp_path):
    with pytest.raises(ArtifactError, match="could not be written"):
        cuq.save_model(
            own("mlp", (1, 8, 8)),
            tmp_path / "no" / "m.pt",
            arch="compress-uq:mlp",
            num_classes=10,
            input_shape=(1, 8, 8),
        )


def test_a_model_whose_modules_ask_for_the_version_of_their_weights(tmp_path):
    model = cuq.build_model("torchvision:mnasnet0_5", num_classes=10)
    cuq.save_model(model, tmp_path / "m.pt", arch="torchvision:mnasnet0_5", num_classes=10)
    back = cuq.load_model(tmp_path / "m.pt")
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in model.state_dict().items())
