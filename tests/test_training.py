"""The training loop: what it learns, what it repeats, what it refuses."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Subset, TensorDataset

import compress_uq as cuq
from compress_uq.config import TrainingConfig, from_toml, to_toml
from compress_uq.errors import DataError, InputError, ModelError, UnknownNameError
from compress_uq.progress import Progress
from compress_uq.training import fit_network, resolve_device
from compress_uq.training.loss import TrainingLoss, class_weights
from small_models import own


def network():
    torch.manual_seed(1)
    return own("mlp", (1, 8, 8), widths=(16,))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def train(splits):
    return Subset(splits.train, range(200))


def test_it_learns_and_leaves_the_caller_alone(splits):
    model = network()
    before = weights(model).clone()
    result = cuq.finetune(model, splits, epochs=5, lr=0.05)
    assert torch.equal(weights(model), before)
    assert [e.loss for e in result.history] == sorted((e.loss for e in result.history), reverse=True)
    assert result.history[-1].accuracy > 0.8
    assert all(e.seconds > 0 for e in result.history)
    assert not result.model.training


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(train):
    splits = cuq.Splits(train=train)
    runs = [weights(cuq.finetune(network(), splits, epochs=2, seed=s, augment="crop").model) for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_no_epochs_change_nothing(train):
    model = network()
    result = cuq.finetune(model, cuq.Splits(test=train), epochs=0)
    assert torch.equal(weights(result.model), weights(model))
    assert result.history == ()


class StopError(Exception):
    pass


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(train, tmp_path):
    config = TrainingConfig(epochs=4, lr=0.05, batch_size=64)

    def run(model, **options):
        fit_network(model, train, config, augment="crop", **options)
        return weights(model)

    teacher = network()
    straight = run(network(), teacher=teacher)

    def interrupt(event: Progress):
        if event.step > 9:  # in the third epoch of four steps
            raise StopError

    file = tmp_path / "state.pt"
    with pytest.raises(StopError):
        run(network(), teacher=teacher, checkpoint=file, progress=interrupt)
    steps = []
    resumed = run(network(), teacher=teacher, checkpoint=file, progress=lambda e: steps.append(e.step))
    assert steps[0] == 9, "two epochs of four steps were not repeated"
    assert torch.equal(resumed, straight)
    # Another model, or another teacher, does not take up what this one left.
    torch.manual_seed(5)
    other = own("mlp", (1, 8, 8), widths=(16,))
    steps.clear()
    run(network(), teacher=other, checkpoint=file, progress=lambda e: steps.append(e.step))
    assert steps[0] == 1


def test_distillation_loss_by_hand():
    teacher = nn.Linear(3, 4)
    images, student, labels = torch.randn(5, 3), torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    config = TrainingConfig(distillation_weight=0.7, distillation_temperature=3.0)
    got = TrainingLoss(config, None, teacher)(images, student, labels)
    p = F.softmax(teacher(images) / 3, 1)
    divergence = (p * (p.log() - F.log_softmax(student / 3, 1))).sum(1).mean()
    wanted = 0.3 * F.cross_entropy(student, labels) + 0.7 * 9 * divergence
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)
    plain = TrainingLoss(config, None, None)(images, student, labels)
    assert plain.item() == pytest.approx(F.cross_entropy(student, labels).item())


def test_class_weights_by_hand(train):
    labels = torch.tensor([0, 0, 0, 1])
    data = TensorDataset(torch.zeros(4, 1), labels)
    balanced = class_weights(TrainingConfig(class_weights="balanced"), data, torch.device("cpu"))
    assert balanced.tolist() == pytest.approx([4 / (2 * 3), 4 / 2])
    logits = torch.randn(4, 2)
    got = TrainingLoss(TrainingConfig(), balanced, None)(torch.zeros(4, 1), logits, labels)
    assert got.item() == pytest.approx(F.cross_entropy(logits, labels, weight=balanced).item(), rel=1e-5)
    with pytest.raises(DataError, match="2 class weights given: the data have 10 classes"):
        cuq.finetune(network(), cuq.Splits(train=train), epochs=1, class_weights=(1.0, 2.0))


def test_a_teacher_is_left_as_it_was(train):
    teacher = own("cnn", (1, 8, 8), widths=(8,)).train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    cuq.finetune(network(), cuq.Splits(train=train), teacher=teacher, epochs=1)
    assert teacher.training
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.requires_grad for p in teacher.parameters())


def test_any_function_augments(train):
    seen = []

    def shift(images, generator):
        seen.append(len(images))
        return images.roll(1, 3)

    cuq.finetune(network(), cuq.Splits(train=train), epochs=1, augment=shift, batch_size=100)
    assert seen == [100, 100]


def test_a_last_batch_of_one_image_does_not_break_batch_norm(train):
    odd = Subset(train, range(65))
    cuq.finetune(own("cnn", (1, 8, 8), widths=(8,)), cuq.Splits(train=odd), epochs=1, batch_size=64)


@pytest.mark.parametrize(
    "options",
    [{"lr_schedule": "cosine"}, {"optimizer": "adam", "lr": 0.001, "lr_schedule": "constant"}, {"workers": 1}],
)
def test_other_settings_train_too(train, options):
    history = cuq.finetune(network(), cuq.Splits(train=train), epochs=3, **options).history
    assert history[-1].loss < history[0].loss


def test_what_cannot_be_trained(train):
    frozen = network().requires_grad_(False)
    with pytest.raises(ModelError, match="all parameters are frozen"):
        cuq.finetune(frozen, cuq.Splits(train=train), epochs=1)
    with pytest.raises(DataError, match="'train'"):
        cuq.finetune(network(), cuq.Splits(test=train), epochs=1)
    with pytest.raises(ModelError, match="the loss is"):
        cuq.finetune(network(), cuq.Splits(train=train), epochs=3, lr=1e30)
    with pytest.raises(UnknownNameError, match="did you mean 'epochs'"):
        cuq.finetune(network(), cuq.Splits(train=train), epoch=1)
    with pytest.raises(UnknownNameError, match="did you mean 'crop-flip'"):
        cuq.finetune(network(), cuq.Splits(train=train), epochs=1, augment="crop_flip")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", -1), ("lr", 0), ("lr", float("nan")), ("batch_size", 0), ("workers", -1), ("lr_schedule", "linear"),
        ("optimizer", "sdg"), ("class_weights", "balance"), ("class_weights", (0.0, 0.0)), ("distillation_weight", 2),
        ("distillation_temperature", 0), ("weight_decay", -1),
    ],
)  # fmt: skip
def test_impossible_settings_repeat_what_was_given(field, value):
    with pytest.raises(InputError, match=field):
        TrainingConfig(**{field: value})


def test_devices():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type in ("cpu", "cuda")
    for name in ("tpu", "cuda:99", "mps"):
        with pytest.raises(InputError, match=name):
            resolve_device(name)


def test_a_configuration_survives_toml():
    config = TrainingConfig(epochs=3, lr=0.1, class_weights=(1.0, 2.5), augment='a "quoted" name')
    assert from_toml(TrainingConfig, to_toml(config)) == config
    with pytest.raises(UnknownNameError, match="did you mean 'epochs'"):
        from_toml(TrainingConfig, "epoch = 3")
    with pytest.raises(InputError, match="not valid TOML"):
        from_toml(TrainingConfig, "epochs 3")


def test_prepare_uncertainty_is_for_your_own_loop(splits):
    model = own("cnn", (1, 8, 8), widths=(16,))
    prepared = cuq.prepare_uncertainty(model, cuq.uq.MCDropout(sampling_budget=9), splits.example())
    optimizer = torch.optim.SGD(prepared.parameters(), 0.1)
    prepared.train()
    F.cross_entropy(prepared(torch.randn(8, 1, 8, 8)), torch.arange(8)).backward()
    optimizer.step()
    uncertain = cuq.fit_uncertainty(prepared, method=cuq.uq.MCDropout(sampling_budget=9, samples=4))
    assert uncertain.members.count == 4
    plain = copy.deepcopy(prepared).eval()
    assert torch.allclose(plain(splits.example()), prepared.eval()(splits.example()))
