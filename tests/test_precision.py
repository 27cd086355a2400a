"""Files in fp16 and int8, files that take pixels, and the gates that belong to them."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

import compress_uq as cuq
from compress_uq.calibration import CALIBRATORS
from compress_uq.data import ImageTensors, as_pixels
from compress_uq.errors import DataError, GateError, InputError, UnknownNameError
from compress_uq.export.body import LOGITS, FileMembers
from compress_uq.export.casts import transpose_before_rounding
from compress_uq.export.gates import GATES
from compress_uq.export.half import HalfMembers
from compress_uq.export.layouts import Pixels
from compress_uq.runtime import OnnxPredictor, session
from compress_uq.stages import Origin
from compress_uq.uncertain import UncertainModel
from compress_uq.uq import MSP, MCDropout, Networks, Trained
from small_models import randomise

SHAPE = (3, 16, 16)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
ORIGIN = Origin(SHAPE, labels=tuple("abcd"), mean=MEAN, std=STD)


@pytest.fixture(scope="module")
def splits() -> cuq.Splits:
    """Smooth images of four kinds, with some labels wrong."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(400, 3, 4, 4, generator=generator)
    pixels = (F.interpolate(coarse, SHAPE[1:], mode="bilinear") * 255).byte()
    labels = (coarse.mean((1, 2, 3)) > 0.5).long() + 2 * (coarse[:, 0].mean((1, 2)) > 0.5)
    labels[::7] = torch.randint(0, 4, labels[::7].shape, generator=generator)

    def part(low, high):
        return ImageTensors(pixels[low:high], labels[low:high], MEAN, STD)

    return cuq.Splits(calibration=part(0, 150), decision=part(150, 300), test=part(300, 400))


@pytest.fixture(scope="module")
def model(splits) -> UncertainModel:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 4),
    )  # fmt: skip
    randomise(network)
    images, labels = normalised(splits.test), splits.test.labels
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    method = MCDropout(p=0.2, samples=5, at=("6",))
    uncertain = UncertainModel(method.fit(Trained((network,), ORIGIN)), method, ORIGIN)
    calibrated = cuq.calibrate(uncertain, splits)
    return cuq.decide(calibrated, splits, risk=0.5, coverage=0.7)


@pytest.fixture(scope="module")
def files(model, splits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("precision")
    results = {
        "fp32": cuq.export_onnx(model, folder / "fp32.onnx"),
        "fp16": cuq.export_onnx(model, folder / "fp16.onnx", precision="fp16"),
        "cpu": cuq.export_onnx(model, folder / "cpu.onnx", precision="int8", splits=splits),
        "tensorrt": cuq.export_onnx(
            model, folder / "tensorrt.onnx", precision="int8", quantization="tensorrt", input="uint8-nhwc",
            resize=(24, 20), splits=splits,
        ),
        "pixels": cuq.export_onnx(model, folder / "pixels.onnx", input="uint8-nhwc"),
    }  # fmt: skip
    return folder, results


def normalised(dataset, count=100):
    return torch.stack([dataset[i][0] for i in range(count)])


def loaded(files, name) -> onnx.ModelProto:
    return onnx.load(files[0] / f"{name}.onnx")


# Layouts.


def test_pixels_are_normalised_and_resized_as_torch_does_it():
    pixels = torch.randint(0, 256, (2, 20, 24, 3), dtype=torch.uint8)
    wanted = F.interpolate(
        pixels.permute(0, 3, 1, 2).float(), SHAPE[1:], mode="bilinear", antialias=True, align_corners=False
    )
    wanted = (wanted / 255 - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)
    assert torch.allclose(Pixels(SHAPE, MEAN, STD, (20, 24))(pixels), wanted, atol=1e-4)


def test_a_file_that_takes_pixels_answers_as_the_one_that_takes_numbers(files, splits):
    folder, _ = files
    dataset = splits.test
    numbers, pixels = OnnxPredictor(folder / "fp32.onnx"), OnnxPredictor(folder / "pixels.onnx")
    assert (pixels.takes_pixels, pixels.input_shape, pixels.image_shape) == (True, (16, 16, 3), SHAPE)
    raw = dataset.pixels.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(as_pixels(normalised(dataset), (MEAN, STD)).numpy(), raw)
    a, b = numbers(normalised(dataset).numpy()), pixels(raw)
    assert np.allclose(a.probabilities, b.probabilities, atol=1e-5)
    assert pixels.metadata["input"] == {
        "shape": [3, 16, 16], "mean": list(MEAN), "std": list(STD), "layout": "NHWC uint8", "size": [16, 16],
    }  # fmt: skip
    one, other = (cuq.evaluate(folder / f"{name}.onnx", splits) for name in ("fp32", "pixels"))
    assert one.metrics["nll"].value == pytest.approx(other.metrics["nll"].value, abs=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((1, 16, 16, 3), np.float32), "takes pixels, uint8"),
        (np.zeros((1, 16, 16, 3), np.int64), "takes pixels, uint8"),
        (np.zeros((1, 3, 16, 16), np.uint8), r"expected \(N, 16, 16, 3\)"),
    ],
)
def test_what_is_no_pixel_is_refused(files, wrong, message):
    with pytest.raises(InputError, match=message):
        OnnxPredictor(files[0] / "pixels.onnx")(wrong)


def test_splits_of_another_normalisation_are_refused(files, splits):
    moved = ImageTensors(splits.test.pixels, splits.test.labels, (0.4,), (0.05,))
    with pytest.raises(DataError, match="takes pixels"):
        cuq.evaluate(files[0] / "pixels.onnx", cuq.Splits(test=moved))


def test_arguments_that_do_not_go_together(model, splits, tmp_path):
    def export(**options):
        cuq.export_onnx(model, tmp_path / "m.onnx", **options)

    with pytest.raises(InputError, match="int8.*splits="):
        export(precision="int8")
    with pytest.raises(DataError, match="'calibration'"):
        export(precision="int8", splits=cuq.Splits(test=splits.test))
    with pytest.raises(InputError, match="resize is done on pixels"):
        export(resize=(8, 8))
    with pytest.raises(InputError, match="height and width"):
        export(input="uint8-nhwc", resize=(0, 8))
    for option in ({"precision": "fp8"}, {"input": "nchw"}, {"precision": "int8", "quantization": "s4"}):
        with pytest.raises(UnknownNameError):
            export(splits=splits, **option)
    bare = UncertainModel(model.members, model.method, Origin(SHAPE))
    with pytest.raises(InputError, match="mean and std"):
        cuq.export_onnx(bare, tmp_path / "m.onnx", input="uint8-nhwc")
    assert not list(tmp_path.iterdir())


# fp16.


def test_fp16_computes_in_half_and_answers_in_float32(model, files, splits):
    x = normalised(splits.test)
    got = OnnxPredictor(files[0] / "fp16.onnx")(x.numpy())
    with torch.no_grad():
        wanted = model(x)
    for name, a, b in zip(got._fields, got, wanted, strict=True):
        assert a.dtype == b.numpy().dtype, name
    assert 0 < np.abs(got.probabilities - wanted.probabilities.numpy()).max() < 5e-3
    assert cuq.metrics.spearman(got.mutual_information, wanted.mutual_information.numpy()) > 0.999
    operators = {node.op_type for node in loaded(files, "fp16").graph.node}
    assert "BatchNormalization" not in operators  # multiplied into the convolutions beforehand
    assert files[1]["fp16"].size_bytes < files[1]["fp32"].size_bytes


class Unfoldable(nn.Module):
    """A norm before its convolution, and a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv, self.last = nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.LayerNorm(8)

    def forward(self, x):
        return self.last(self.conv(self.norm(x)).mean((2, 3)))


def test_norms_stay_in_float32_whatever_their_variance():
    """A variance of 1e6 is infinite in half, one of 1e-9 is 0."""
    folded = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(8))
    x = torch.randn(4, *SHAPE)
    folded(x)
    for network, norm in ((folded, folded[1]), (kept := Unfoldable(), kept.norm)):
        randomise(network)
        norm.running_var.copy_(torch.logspace(-9, 6, len(norm.running_var)))
        norm.weight.data.copy_(norm.running_var.sqrt())
        norm.eps = 1e-12
        members = Networks([network])
        got, wanted = HalfMembers(members, x)(x), members(x)
        assert got.dtype == torch.float32
        assert torch.allclose(got, wanted, rtol=0.02, atol=0.01 * float(wanted.abs().max()))
    assert isinstance(HalfMembers(Networks([folded]), x).networks[0][1], nn.Identity)
    assert folded[1].running_var.dtype == folded[0].weight.dtype == torch.float32


# int8.


def test_int8_quantises_convolutions_and_matrix_products_alone(files, splits):
    assert files[1]["cpu"].gates["precision"].startswith("3 of 3 operators in 8-bit")
    # The two products that resize, and the rest before the body, stay in float32.
    assert files[1]["tensorrt"].gates["precision"].startswith("3 of 5 operators in 8-bit")
    for name, kind in (("cpu", TensorProto.UINT8), ("tensorrt", TensorProto.INT8)):
        proto = loaded(files, name)
        onnx.checker.check_model(proto, full_check=True)
        assert {o.domain: o.version for o in proto.opset_import} == {"": 18}
        stored = {t.name: t for t in proto.graph.initializer}
        points = {stored[n.input[2]].data_type for n in proto.graph.node if n.op_type == "QuantizeLinear"}
        assert kind in points
    reference = OnnxPredictor(files[0] / "fp32.onnx")(normalised(splits.test).numpy())
    got = OnnxPredictor(files[0] / "cpu.onnx")(normalised(splits.test).numpy())
    assert cuq.metrics.spearman(got.mutual_information, reference.mutual_information) > 0.95
    assert (got.label == reference.label).mean() >= 0.95


def test_metadata_say_how_numbers_are_stored(files):
    told = {name: OnnxPredictor(files[0] / f"{name}.onnx").metadata for name in files[1]}
    assert {name: m["precision"] for name, m in told.items()} == {
        "fp32": "fp32", "fp16": "fp16", "cpu": "int8", "tensorrt": "int8", "pixels": "fp32",
    }  # fmt: skip
    assert told["fp16"]["quantization"] is None
    assert told["cpu"]["quantization"]["activations"] == "uint8"
    assert told["tensorrt"]["quantization"]["symmetric"] is True
    assert told["cpu"]["refitted"] == ["calibrator", "acceptance", "sets"] == list(files[1]["cpu"].refitted)
    assert told["fp16"]["refitted"] == []


def test_calibrator_and_rules_are_fitted_on_the_files_own_logits(model, files, splits):
    file = OnnxPredictor(files[0] / "cpu.onnx")
    whole = loaded(files, "cpu")
    whole.graph.value_info.append(helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, [5, "N", 4]))
    body = onnx.utils.Extractor(whole).extract_model(["images"], [LOGITS])
    members = FileMembers(body.SerializeToString(), model.members)
    logits = members(normalised(splits.calibration, 150)).numpy()
    temperature = CALIBRATORS["temperature"].fit(logits, splits.calibration.labels.numpy())
    assert file.metadata["calibration_state"] == {
        k: pytest.approx(v.tolist(), abs=1e-6) for k, v in temperature.state_dict().items()
    }
    assert file.metadata["calibration_state"] != OnnxPredictor(files[0] / "fp32.onnx").metadata["calibration_state"]
    thresholds = file.metadata["thresholds"]
    assert thresholds["prediction_set"]["options"]["coverage"] == 0.7
    assert thresholds["accepted"]["options"]["risk"] == 0.5
    # The rule of sets saw one half of the decision split: there the truth is named as often as asked for.
    answers = file(normalised(splits.decision, 150).numpy())
    named = answers.prediction_set[np.arange(150), splits.decision.labels.numpy()]
    assert named.mean() > 0.6


def test_a_posterior_beside_the_network_is_not_quantised(splits, tmp_path):
    network = randomise(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))
    )
    fitted = cuq.fit_uncertainty(
        network, replace(splits, train=splits.decision, decision=None), method="laplace",
        example_inputs=torch.zeros(1, *SHAPE),
    )  # fmt: skip
    result = cuq.export_onnx(fitted, tmp_path / "m.onnx", precision="int8", splits=splits)
    assert result.gates["precision"].startswith("2 of 4 operators in 8-bit")


def test_seeded_members_in_int8(model, splits, tmp_path):
    plain = model.but(acceptance=None, sets=None)
    cuq.export_onnx(plain, tmp_path / "m.onnx", precision="int8", sampling="seeded", splits=splits)
    file, x = OnnxPredictor(tmp_path / "m.onnx"), normalised(splits.test, 8).numpy()
    seed = np.arange(8)
    assert np.array_equal(file(x, seed).probabilities, file(x, seed).probabilities)
    assert not np.array_equal(file(x, seed).probabilities, file(x, seed + 1).probabilities)


def test_every_gate_is_passed_again_without_torch(files):
    for name in files[1]:
        assert list(cuq.verify(files[0] / f"{name}.onnx").checks) == list(GATES)


# The card and the command line.


def test_precisions_side_by_side(files, splits):
    folder, results = files
    card = cuq.compare_precisions({"fp32": folder / "fp32.onnx", "int8": folder / "cpu.onnx"}, splits)
    told = card.to_json()
    assert (told["reference"], told["images"]) == ("fp32", 100)
    assert told["files"]["fp32"]["likeness"] == {
        "agreement": 1.0, "spearman_mutual_information": pytest.approx(1.0), "difference": 0.0,
    }  # fmt: skip
    got = OnnxPredictor(folder / "cpu.onnx")(normalised(splits.test).numpy())
    wanted = OnnxPredictor(folder / "fp32.onnx")(normalised(splits.test).numpy())
    alike = told["files"]["int8"]["likeness"]
    assert alike["agreement"] == (got.label == wanted.label).mean()
    assert alike["difference"] == pytest.approx(np.abs(got.probabilities - wanted.probabilities).mean())
    assert told["files"]["int8"]["cost"]["size_bytes"] == results["cpu"].size_bytes
    text = card.to_markdown()
    assert "| agreement, to fp32 | 1.0000 |" in text
    assert card.unmet("int8", [cuq.Requirement.parse("accuracy>=1.1")])
    with pytest.raises(InputError, match="no file"):
        cuq.compare_precisions({}, splits)


def test_a_file_that_resizes_is_measured_on_scaled_images(files, splits):
    resized = cuq.evaluate(files[0] / "tensorrt.onnx", splits)
    plain = cuq.evaluate(files[0] / "fp32.onnx", splits)
    assert abs(resized.metrics["accuracy"].value - plain.metrics["accuracy"].value) < 0.1


def test_command_line(command, bundle_folder):
    code, out, err = command(
        "export", bundle_folder, "--out", "q.onnx", "--precision", "int8", "--require", "accuracy>=0.5", "--json"
    )
    assert code == 0, err
    told = json.loads(out)
    assert told["refitted"] == ["calibrator"]
    assert set(told["card"]["files"]) == {"fp32", "int8"}
    assert "spearman mutual information" in err
    code, _, err = command(
        "export", bundle_folder, "--out", "p.onnx", "--input", "uint8-nhwc", "--require", "accuracy>=1.1"
    )
    assert code == 1
    assert "--require is not met: accuracy" in err
    assert command("verify", "p.onnx")[0] == 0
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.uint8)
    Image.fromarray(pixels).save("x.png")
    answers = [json.loads(command("predict", a, "x.png", "--json")[1])[0] for a in (bundle_folder, "p.onnx")]
    assert answers[0]["label"] == answers[1]["label"]
    assert answers[0]["entropy"] == pytest.approx(answers[1]["entropy"], abs=1e-4)
    assert command("predict", "p.onnx", "x.png", "--mean", "0.5")[0] == 2
    figures = [json.loads(command("evaluate", a, "--data", "digits", "--json")[1]) for a in (bundle_folder, "p.onnx")]
    assert figures[0]["metrics"]["nll"]["value"] == pytest.approx(figures[1]["metrics"]["nll"]["value"], abs=1e-4)
    assert command("export", bundle_folder, "--out", "r.onnx", "--resize", "12")[0] == 2
    assert command("export", bundle_folder, "--out", "r.onnx", "--resize", "12x12")[0] == 2


def test_gate_against_a_graph_that_ends_the_process(model, tmp_path, monkeypatch):
    import compress_uq.runtime as runtime

    assert runtime.survives_loading(b"no graph")  # refused, which is no crash
    monkeypatch.setattr(runtime.sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\nkill -SEGV $$\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(GateError, match="'loads'.*crash"):
        cuq.export_onnx(model, tmp_path / "m.onnx", precision="fp16")
    assert not (tmp_path / "m.onnx").exists()


def test_a_vision_transformer_in_fp16(tmp_path):
    """onnxruntime 1.31 dies on a transpose of a layer norm's rounded output before a product."""
    network = VisionTransformer(32, 16, 1, 2, 16, 32, num_classes=4).eval()
    torch.nn.init.normal_(network.heads.head.weight)
    model = UncertainModel(Networks([network]), MSP(), Origin((3, 32, 32)))
    cuq.export_onnx(model, tmp_path / "m.onnx", precision="fp16")
    proto = onnx.load(tmp_path / "m.onnx")
    halves = {n.output[0] for n in proto.graph.node if n.op_type == "Cast" and n.attribute[0].i == TensorProto.FLOAT16}
    turned = [n for n in proto.graph.node if n.op_type == "Transpose"]
    assert halves
    assert turned
    assert halves.isdisjoint(n.input[0] for n in turned)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        wanted = model(x).probabilities.numpy()
    assert np.abs(OnnxPredictor(tmp_path / "m.onnx")(x.numpy()).probabilities - wanted).max() < 5e-3


def test_only_what_is_transposed_alone_is_turned():
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Transpose", ["h"], ["t"], perm=[1, 0]),
        helper.make_node("Cast", ["x"], ["k"], to=TensorProto.FLOAT16),
        helper.make_node("Transpose", ["k"], ["u"], perm=[1, 0]),
        helper.make_node("MatMul", ["k", "u"], ["y"]),
        helper.make_node("MatMul", ["y", "t"], ["z"]),
    ]
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, [3, 3])], [value("z", TensorProto.FLOAT16, [3, 3])]
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    before = session(proto.SerializeToString(), optimise=False)
    transpose_before_rounding(proto)
    onnx.checker.check_model(proto, full_check=True)
    assert [n.op_type for n in proto.graph.node] == ["Transpose", "Cast", "Cast", "Transpose", "MatMul", "MatMul"]
    x = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    after = session(proto.SerializeToString(), optimise=False)
    assert np.allclose(before.run(None, {"x": x})[0], after.run(None, {"x": x})[0], rtol=5e-3)
