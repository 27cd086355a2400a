"""Methods of weight distributions: TRADI, SWAG, Gaussian perturbation, and Laplace on the last layer."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Subset, TensorDataset

import compress_uq as cuq
from compress_uq.batch_norm import batch_norms, estimate_statistics
from compress_uq.config import configured
from compress_uq.cost import Cost
from compress_uq.errors import InputError, UncertaintyError, UnknownNameError
from compress_uq.export import check_graph
from compress_uq.inputs import configure_method
from compress_uq.progress import Progress
from compress_uq.stages import Origin
from compress_uq.uq import METHODS, MSP, SWAG, TRADI, GaussianPerturbation, Laplace, Trained
from compress_uq.uq.curvature import Factors
from compress_uq.uq.drawn import flat_weights, tracked_weights, with_weights
from compress_uq.uq.gaussian import tempered_losses
from compress_uq.uq.laplace import _with_one
from compress_uq.uq.swag import SwagGaussian
from compress_uq.uq.tradi import automatic_noise, kalman_gain
from small_models import ConvHead, own, randomise

SHAPE = (1, 8, 8)
SMALL_SWAG = SWAG(samples=3, rank=4, snapshots=8)
CONFIGURED = [TRADI(samples=3), SMALL_SWAG, GaussianPerturbation(samples=3, scale=0.05), Laplace()]
DRAWN = CONFIGURED[:3]


def ids(methods):
    return [method.name for method in methods]


def network():
    torch.manual_seed(1)
    return own("cnn", SHAPE, widths=(8, 8))


def trained(model, splits=None, observed=None):
    images = {} if splits is None else {"train": splits.train, "calibration": splits.calibration}
    return Trained((model,), Origin(SHAPE), observed, **images)


def observe(method, model, steps, lr=0.1, momentum=0.0, total=None):
    """A training of one's own; the observer, and the weights and gradients at each step."""
    observer = method.observer(model)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=momentum)
    seen = []
    for step in range(steps):
        images = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(model(images), torch.arange(4)).backward()
        gradients = torch.cat([p.grad.flatten() for p in tracked_weights(model)])
        optimizer.step()
        observer.after_step(step + 1, total or steps, lr)
        seen.append((flat_weights(model), gradients))
    return observer, seen


@pytest.fixture(scope="module")
def small(splits):
    part = {name: Subset(getattr(splits, name), range(150)) for name in ("train", "test")}
    return cuq.Splits(**part, calibration=splits.calibration, info=splits.info)


# TRADI


def test_kalman_gains_are_those_of_the_published_code():
    gains = {}
    for noise in (1e-4, 5e-5):
        doubt, gains[noise] = 0.0, []
        for _ in range(6000):
            gain, doubt = kalman_gain(doubt, noise, 10.0)
            gains[noise].append(gain)
    assert gains[1e-4][0] == pytest.approx(1e-5, rel=1e-4)
    assert gains[1e-4][468] == pytest.approx(0.00285, abs=5e-6)
    assert gains[1e-4][-1] == pytest.approx(0.003157, abs=1e-6)
    assert gains[5e-5][-1] == pytest.approx(0.002234, abs=1e-6)


def test_long_trainings_have_the_published_noise_and_short_ones_forget_their_start():
    assert automatic_noise(14_070) == 10
    for steps in (60, 600, 6000):
        doubt, left = 0.0, 1.0
        for _ in range(steps):
            gain, doubt = kalman_gain(doubt, 1e-4, automatic_noise(steps))
            left *= 1 - gain
        assert left < 1e-3


@pytest.mark.parametrize(("start", "noise"), [("weights", 0.0), ("zero", 10.0)])
def test_tracking_equals_the_recursion_written_out_for_one_weight(start, noise):
    model = network()
    first = flat_weights(model)
    rows = torch.cat([torch.full((p.numel(),), float(len(p))) for p in tracked_weights(model)])
    observer, seen = observe(TRADI(start=start, observation_noise=noise), model, 30)
    state = observer.state_dict()
    for place in (0, 50, len(first) - 1):
        mean = first[place].item() if start == "weights" else 0.0
        variance = 0.0 if start == "weights" else math.sqrt(2 / rows[place].item())
        p = pv = 0.0
        r = noise or min(10.0, 1e-4 * 3.0**2)
        for weights, gradients in seen:
            w, g = weights[place].item(), gradients[place].item()
            p += 1e-4
            k = p / (p + r)
            mean = (1 - k) * (mean - 0.1 * g) + k * w
            p *= 1 - k
            pv += 5e-5
            kv = pv / (pv + r)
            variance = (1 - kv) * (variance + (0.1 * g) ** 2) + kv * (w - mean) ** 2
            pv *= 1 - kv
        assert state["mean"][place].item() == pytest.approx(mean, rel=1e-4, abs=1e-7)
        assert state["variance"][place].item() == pytest.approx(variance, rel=1e-4, abs=1e-12)


def test_batch_norm_is_copied_and_not_tracked():
    model = network()
    norms = sum(p.numel() for layer in batch_norms(model).values() for p in layer.parameters())
    assert norms == 32
    assert len(flat_weights(model)) == sum(p.numel() for p in model.parameters()) - norms
    again = with_weights(model, flat_weights(model))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    other = with_weights(model, flat_weights(model) + 1).state_dict()
    assert torch.equal(other["1.weight"], model.state_dict()["1.weight"])
    assert torch.equal(other["0.weight"], model.state_dict()["0.weight"] + 1)


def test_members_without_variance_are_the_mean(small):
    model = network()
    mean = flat_weights(model) + 0.01
    observed = {"mean": mean, "variance": torch.zeros_like(mean), "scalars": torch.zeros(3, dtype=torch.float64)}
    members = TRADI(samples=2, norm_batches=0).fit(trained(model, small, observed))
    images = torch.randn(3, *SHAPE)
    expected = with_weights(model, mean)(images)
    assert torch.equal(members(images), torch.stack([expected, expected]))


def test_draws_have_the_tracked_mean_and_variance():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    mean, variance = torch.randn(650), torch.rand(650)
    observed = {"mean": mean, "variance": variance, "scalars": torch.zeros(3, dtype=torch.float64)}
    drawn, _ = TRADI().distribution(model, trained(model, observed=observed))
    generator = torch.Generator().manual_seed(0)
    sample = torch.stack([drawn.draw(generator) for _ in range(4000)])
    assert ((sample.mean(0) - mean) / (variance / 4000).sqrt()).abs().max() < 5
    assert (sample.var(0) / variance - 1).abs().max() < 5 * math.sqrt(2 / 4000)


def test_a_start_at_zero_has_to_be_forgotten(small):
    method = TRADI(start="zero", observation_noise=10.0)
    result = cuq.finetune(network(), small, method=method, epochs=2)
    with pytest.raises(UncertaintyError, match="still hold 100% of their start"):
        cuq.fit_uncertainty(result, small)
    result = cuq.finetune(network(), small, method=TRADI(samples=2, start="zero"), epochs=8, batch_size=32)
    assert cuq.fit_uncertainty(result, small).members.found["start_left"] < 0.01


# SWAG


def test_swag_collects_the_moments_of_its_snapshots():
    model = network()
    observer, seen = observe(SWAG(rank=4, snapshots=8), model, 40, total=40)
    state = observer.state_dict()
    taken = torch.stack([weights for step, (weights, _) in enumerate(seen, 1) if step > 20 and (40 - step) % 2 == 0])
    assert int(state["snapshots"]) == len(taken) == 10
    assert torch.allclose(state["mean"], taken.mean(0), atol=1e-6)
    assert torch.allclose(state["squares"] / 10, taken.var(0, correction=0), rtol=1e-3, atol=1e-9)
    running = taken.cumsum(0) / torch.arange(1, 11).unsqueeze(1)
    assert torch.allclose(state["deviations"], (taken - running)[-4:], atol=1e-6)


@pytest.mark.parametrize("rank", [0, 3])
def test_swag_samples_have_the_covariance_of_the_paper(rank):
    generator = torch.Generator().manual_seed(0)
    mean, variance, deviations = torch.randn(4), torch.rand(4), torch.randn(rank, 4, generator=generator)
    gaussian = SwagGaussian(mean, variance, deviations, 0.5)
    sample = torch.stack([gaussian.draw(generator) for _ in range(40_000)])
    expected = 0.5 * (torch.diag(variance) + (deviations.T @ deviations / (rank - 1) if rank else 0))
    assert torch.allclose(sample.mean(0), mean, atol=0.03)
    assert torch.allclose(torch.cov(sample.T), expected, atol=0.05)


def test_one_swag_member_is_the_average_of_weights(small):
    result = cuq.finetune(network(), small, method=SMALL_SWAG, epochs=8, batch_size=32)
    assert result.method.lr_schedule == "hold"
    one = cuq.fit_uncertainty(result, small, method=SWAG(samples=1, rank=4, snapshots=8)).members
    assert torch.equal(flat_weights(one.networks[0]), result.observed["mean"])
    assert one.count == 1


def test_too_few_snapshots_are_refused_at_the_first_step(small):
    steps = []
    with pytest.raises(UncertaintyError, match="has 1 step to take a snapshot of"):
        cuq.finetune(
            network(), small, method=SWAG(share=0.1), epochs=2, batch_size=64,
            progress=lambda event: steps.append(event.step),
        )  # fmt: skip
    assert steps == []


def test_a_short_training_lowers_the_rank(small):
    result = cuq.finetune(network(), small, method="swag", epochs=2, batch_size=64)
    members = cuq.fit_uncertainty(result, small).members
    assert members.found["rank"] == members.found["snapshots"] == 3


# Gaussian perturbation


def test_noise_is_in_proportion_to_each_tensor():
    model = network()
    around, found = GaussianPerturbation(scale=0.1).distribution(model, trained(model))
    parts = around.variance.sqrt().split([p.numel() for p in tracked_weights(model)])
    for part, weights in zip(parts, tracked_weights(model), strict=True):
        assert torch.allclose(part, 0.1 * weights.detach().square().mean().sqrt().expand_as(part))
    assert found == {"scale": 0.1}


@pytest.mark.parametrize("method", [GaussianPerturbation(scale=0.0, norm_batches=0, samples=2), GaussianPerturbation(samples=1)])  # fmt: skip
def test_no_noise_is_the_network_itself(method):
    model = randomise(network())
    images = torch.randn(3, *SHAPE)
    plain = MSP().fit(trained(model))(images)
    assert torch.equal(method.fit(trained(model))(images).mean(0), plain[0])


def test_the_scale_is_chosen_on_calibration_images(dense, splits):
    method = GaussianPerturbation(samples=3, norm_batches=1)
    members = method.fit(trained(dense.model, splits))
    tried = list(members.found["nll"])
    assert members.found["scale"] in [float(scale) for scale in tried[-2:]]
    assert tried[:2] == ["0.02", "0.05"]
    assert method.fit(trained(dense.model)).found == {"scale": 0.1}


def test_nll_at_the_best_temperature_does_not_see_a_temperature():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 500, 4, generator=generator), torch.randint(4, (500,), generator=generator)
    logits[:, torch.arange(500), labels] += 1.0
    plain = F.nll_loss(logits.softmax(2).mean(0).log(), labels).item()
    fitted = tempered_losses(logits, labels).mean().item()
    assert fitted <= plain + 1e-9
    assert tempered_losses(2 * logits, labels).mean().item() == pytest.approx(fitted, abs=1e-3)


# Batch norm


def test_batch_norm_is_estimated_as_the_average_over_batches():
    model = network()
    before = copy.deepcopy(model.state_dict())
    batches = [torch.randn(n, *SHAPE) * 2 + 1 for n in (6, 6, 1)]
    estimate_statistics(model, list(batch_norms(model).values()), batches)
    activations = [F.conv2d(b, before["0.weight"], padding=1).transpose(0, 1).flatten(1) for b in batches[:2]]
    mean = sum(a.mean(1) for a in activations) / 2
    variance = sum(a.var(1) for a in activations) / 2
    assert torch.allclose(model.state_dict()["1.running_mean"], mean, atol=1e-5)
    assert torch.allclose(model.state_dict()["1.running_var"], variance, rtol=1e-4)
    assert all(layer.momentum == 0.1 for layer in batch_norms(model).values())
    assert not any(m.training for m in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items() if k.endswith("weight"))


def test_each_member_has_its_own_statistics_of_the_same_images(small):
    members = GaussianPerturbation(samples=2, scale=0.2, norm_batches=1).fit(trained(network(), small))
    for member in members.networks:
        bare = copy.deepcopy(member)
        loader = torch.utils.data.DataLoader(small.train, 128, shuffle=True, generator=torch.Generator().manual_seed(0))
        estimate_statistics(bare, list(batch_norms(bare).values()), [next(iter(loader))[0]])
        assert torch.equal(bare.state_dict()["1.running_mean"], member.state_dict()["1.running_mean"])
    first, second = (m.state_dict()["1.running_mean"] for m in members.networks)
    assert not torch.equal(first, second)


# Laplace


def two_layers(bias=True):
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 3, bias=bias)).double().float()


def dense_ggn(model, images):
    """Sum over images of J^T (diag p - p p^T) J in the head's weights and bias, float64, by automatic derivatives."""
    head = copy.deepcopy(model[3]).double()
    features = model[:3](images).double()
    flat = torch.cat([head.weight, head.bias.unsqueeze(1)], 1).detach()
    jacobian = torch.stack([
        torch.autograd.functional.jacobian(lambda w, x=x: w @ F.pad(x, (0, 1), value=1.0), flat).flatten(1)
        for x in features.detach()
    ])  # fmt: skip
    p = model(images).double().softmax(1).detach()
    hessian = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return jacobian, torch.einsum("nkp,nkl,nlq->pq", jacobian, hessian, jacobian)


def test_variances_for_one_image_are_those_of_the_whole_gauss_newton_matrix():
    """A sum over one image is a Kronecker product as it stands."""
    model, images = two_layers(), torch.randn(1, *SHAPE)
    _, ggn = dense_ggn(model, images)
    members = Laplace(prior_precision=0.7).fit(
        Trained((model,), Origin(SHAPE), train=TensorDataset(images, torch.zeros(1, dtype=torch.long)))
    )
    new = torch.randn(6, *SHAPE)
    jacobian, _ = dense_ggn(model, new)
    covariance = torch.linalg.inv(ggn + 0.7 * torch.eye(len(ggn)).double())
    variance = torch.einsum("nkp,pq,nkq->nk", jacobian, covariance, jacobian)
    expected = model(new).double() / (1 + math.pi / 8 * variance).sqrt()
    assert torch.allclose(members(new)[0].double(), expected, atol=1e-5)


def test_variances_and_evidence_are_those_of_the_kronecker_product_written_out():
    generator = torch.Generator().manual_seed(0)
    logits, features = torch.randn(50, 3, generator=generator), torch.randn(50, 4, generator=generator).double()
    factors = Factors()
    factors.add(logits[:20], features[:20])
    factors.add(logits[20:], features[20:])
    curvature = factors.decomposed()
    p = logits.double().softmax(1)
    output = sum(torch.diag(row) - torch.outer(row, row) for row in p)
    inputs = sum(torch.outer(row, row) for row in features) / 50
    matrix = torch.kron(output, inputs) + 0.3 * torch.eye(12).double()
    new = torch.randn(5, 4, generator=generator).double()
    jacobian = torch.kron(torch.eye(3).double(), new).view(3, 5, 12).transpose(0, 1)
    variance = torch.einsum("nkp,pq,nkq->nk", jacobian, torch.linalg.inv(matrix), jacobian)
    assert torch.allclose((new @ curvature.input_vectors).square() @ curvature.spread(0.3), variance)
    logdet = torch.linalg.slogdet(matrix)[1] - 12 * math.log(0.3)
    assert curvature.evidence(0.3, 2.0) == pytest.approx(float(-0.5 * (logdet + 0.3 * 2.0)))


@pytest.mark.filterwarnings("ignore")
def test_laplace_agrees_with_laplace_torch():
    laplace = pytest.importorskip("laplace")

    class Padded(nn.Module):
        """A bias as the weight of a feature that is 1, so that both sides factor the same matrix."""

        def __init__(self):
            super().__init__()
            self.body, self.last = two_layers()[:3], nn.Linear(6, 3, bias=False)

        def forward(self, x):
            return self.last(F.pad(self.body(x), (0, 1), value=1.0))

    model = Padded().eval()
    images, labels = torch.randn(40, *SHAPE), torch.arange(40) % 3
    loader = torch.utils.data.DataLoader(TensorDataset(images, labels), 16)
    theirs = laplace.Laplace(model, "classification", subset_of_weights="last_layer", hessian_structure="kron")
    theirs.fit(loader)
    theirs.prior_precision = 0.4
    plain = nn.Sequential(*two_layers()[:3], nn.Linear(5, 3))
    plain.load_state_dict({f"1.{k}": v for k, v in model.body[1].state_dict().items()}, strict=False)
    with torch.no_grad():
        plain[3].weight.copy_(model.last.weight[:, :5])
        plain[3].bias.copy_(model.last.weight[:, 5])
    ours = Laplace(prior_precision=0.4).fit(Trained((plain,), Origin(SHAPE), train=TensorDataset(images, labels)))
    new = torch.randn(7, *SHAPE)
    expected = theirs(new, pred_type="glm", link_approx="probit")
    assert torch.allclose(ours(new)[0].softmax(1), expected, atol=1e-5)


def test_a_strict_prior_leaves_the_softmax_and_a_loose_one_flattens_it(dense, splits):
    images = torch.stack([splits.test[i][0] for i in range(20)])
    plain = MSP().fit(trained(dense.model))(images)
    strict = Laplace(prior_precision=1e12).fit(trained(dense.model, splits))(images)
    assert torch.allclose(strict, plain, atol=1e-4)
    loose = Laplace(prior_precision=1e-3).fit(trained(dense.model, splits))(images)
    assert (loose.softmax(2).amax(2) < plain.softmax(2).amax(2)).all()


def test_the_precision_maximises_evidence_or_held_out_likelihood(dense, splits):
    found = {p: Laplace(prior_precision=p).fit(trained(dense.model, splits)) for p in ("evidence", "held-out")}
    images = torch.stack([x for x, _ in splits.calibration])
    labels = torch.tensor([y for _, y in splits.calibration])

    def nll(precision):
        members = Laplace(prior_precision=precision).fit(trained(dense.model, splits))
        return F.cross_entropy(members(images)[0], labels).item()

    best = found["held-out"].found["prior_precision"]
    assert nll(best) <= min(nll(p) for p in (1e-3, 1e-1, 1.0, 10.0, 1e3)) + 1e-6
    assert 1e-4 < found["evidence"].found["prior_precision"] < 1e4


def test_features_of_laplace_are_what_enters_the_classifier(dense, splits):
    members = Laplace().fit(trained(dense.model, splits))
    images = torch.randn(2, *SHAPE)
    logits, features = members.with_features(images)
    assert torch.equal(logits, members(images))
    head = members.networks[0].get_submodule(members.head)
    assert torch.allclose(head(features[0]), MSP().fit(trained(dense.model))(images)[0], atol=1e-5)
    assert _with_one(features[0])[:, -1].tolist() == [1, 1]


class PlainConvHead(ConvHead):
    """A convolutional classifier whose logits are linear in the mean of what enters it."""

    def forward(self, x):
        return self.last(self.features(x)).mean((2, 3))


def test_a_convolutional_classifier_works_where_its_logits_are_linear():
    train = TensorDataset(torch.randn(20, 3, 12, 12), torch.arange(20) % 7)
    given = Trained((PlainConvHead().eval(),), Origin((3, 12, 12)), train=train)
    assert Laplace().fit(given)(torch.randn(2, 3, 12, 12)).shape == (1, 2, 7)
    with pytest.raises(UncertaintyError, match="last is followed by something else"):
        Laplace().fit(Trained((ConvHead().eval(),), Origin((3, 12, 12)), train=train))


# All of them


class StopError(Exception):
    pass


@pytest.mark.parametrize("method", [TRADI(), SMALL_SWAG], ids=ids([TRADI(), SMALL_SWAG]))
def test_an_interrupted_observation_goes_on_as_if_it_had_not_been(method, small, tmp_path):
    def run(**options):
        return cuq.finetune(network(), small, method=method, epochs=4, batch_size=32, augment="none", **options)

    straight = run()

    def interrupt(event: Progress):
        if event.step > 12:  # in the third epoch of five steps
            raise StopError

    with pytest.raises(StopError):
        run(checkpoint=tmp_path / "s.pt", progress=interrupt)
    steps = []
    resumed = run(checkpoint=tmp_path / "s.pt", progress=lambda e: steps.append(e.step))
    assert steps[0] == 11
    assert straight.observed.keys() == resumed.observed.keys()
    assert all(torch.equal(straight.observed[k], resumed.observed[k]) for k in straight.observed)
    steps.clear()
    cuq.finetune(
        network(), small, epochs=4, batch_size=32, augment="none", lr_schedule=method.lr_schedule,
        checkpoint=tmp_path / "s.pt", progress=lambda e: steps.append(e.step),
    )  # fmt: skip
    assert steps[0] == 1, "a training without an observer does not go on from one with it"


@pytest.mark.parametrize("method", CONFIGURED, ids=ids(CONFIGURED))
def test_from_a_dense_model_to_a_bundle_and_back(method, dense, splits, tmp_path):
    small = cuq.Splits(
        train=splits.train, calibration=splits.calibration, test=Subset(splits.test, range(60)), info=splits.info
    )
    bundle = cuq.compress(
        dense.model, small, sparsity=0.5, uq=method, epochs=2, batch_size=64, arch=dense.architecture,
        calibration="none",
    )  # fmt: skip
    planned, measured = bundle.recipe["uncertainty"], bundle.card.compressed.cost
    assert planned["method"] == method.name
    assert (planned["macs"], planned["stored_bytes"]) == (measured.macs, measured.size_bytes)
    bundle.save(tmp_path / "b")
    loaded = cuq.Bundle.load(tmp_path / "b")
    images = torch.randn(5, *SHAPE)
    for ours, theirs in zip(bundle.model(images), loaded.model(images), strict=True):
        assert ours is None or torch.equal(ours, theirs)
    assert loaded.model.members.found == bundle.model.members.found
    assert loaded.model.members.found
    assert check_graph(bundle.onnx, loaded.model)["parity"].startswith("largest difference")
    probabilities = bundle.model(images).probabilities
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5)


# A convolution of 16 * 9 * 36 multiply-accumulates and a classifier of 576 * 10, with 160 and 5,770 weights.
CONV, FC, BYTES = 5184, 5760, 4 * 5930
COSTS = {
    "msp": (METHODS["msp"](), 1, CONV + FC, BYTES, 1),
    "mc-dropout": (METHODS["mc-dropout"](samples=3, sampling_budget=9.0), 3, CONV + 3 * FC, BYTES + 3 * 16 * 4, 1),
    "mask-ensemble": (METHODS["mask-ensemble"](samples=3, sampling_budget=9.0), 3, CONV + 3 * FC, BYTES + 192, 1),
    "ensemble": (METHODS["ensemble"](3), 3, 3 * (CONV + FC), 3 * BYTES, 3),
    **{m.name: (m, 3, 3 * (CONV + FC), 3 * BYTES, 1) for m in DRAWN},
    "laplace": (Laplace(), 1, CONV + FC + 577 * (577 + 10), BYTES + 4 * 577 * (577 + 10), 1),
}


@pytest.mark.parametrize("name", METHODS.names)
def test_every_method_has_a_cost_line(name):
    method, samples, macs, stored, trainings = COSTS[name]
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
    described = method.describe(model, Origin(SHAPE, Cost(1, 10_000, 1)))
    line = {"method": name, "samples": samples, "macs": macs, "stored_bytes": stored, "trainings": trainings}
    assert line.items() <= described.items()
    assert described["share_of_dense_pass"] == macs / 10_000


def test_training_says_what_a_checkpoint_lacks(command):
    line = "train --arch compress-uq:cnn --arch-option widths=4 --data digits --epochs 1 --out"
    code, _, err = command(*line.split(), "swag.pt", "--uq", "swag")
    assert code == 0
    assert "note: the checkpoint holds the network alone: swag watches" in err
    noted = {name: METHODS[name]().training_note for name in METHODS.names}
    assert all("begins anew in fine-tuning" in noted.pop(name) for name in ("tradi", "swag"))
    assert all(f"all that {name} does" in noted.pop(name) for name in ("gaussian", "laplace"))
    assert not any(noted.values())


def test_what_was_watched_in_a_dense_training_serves_the_model_as_it_is(tmp_path):
    results, splits = cuq.train_dense(
        tmp_path / "m.pt", arch="compress-uq:cnn", data="digits", options={"widths": [4]}, uq=TRADI(samples=2),
        training=cuq.TrainingConfig(epochs=1),
    )  # fmt: skip
    assert cuq.fit_uncertainty(results[0], splits).members.count == 2


@pytest.mark.parametrize("method", DRAWN, ids=ids(DRAWN))
def test_members_differ_and_a_seed_repeats_them(method, small):
    result = cuq.finetune(network(), small, method=method, epochs=8, batch_size=32)
    images = torch.randn(4, *SHAPE)
    first, second = (cuq.fit_uncertainty(result, small).members(images) for _ in range(2))
    assert torch.equal(first, second)
    assert first.std(0).max() > 1e-5


@pytest.mark.parametrize("method", [TRADI(), SMALL_SWAG], ids=ids([TRADI(), SMALL_SWAG]))
def test_a_missed_stage_is_named(method, dense, splits, small):
    missed = rf"call finetune\(\.\.\., method='{method.name}'\)"
    with pytest.raises(UncertaintyError, match=missed):
        cuq.fit_uncertainty(dense.model, splits, method=method, example_inputs=torch.randn(1, *SHAPE))
    with pytest.raises(UncertaintyError, match=missed):
        cuq.fit_uncertainty(cuq.finetune(network(), small, epochs=1), small, method=method)
    with pytest.raises(InputError, match="epochs=0"):
        cuq.finetune(network(), small, method=method, epochs=0)
    with pytest.raises(InputError, match="epochs=0"):
        cuq.plan_compression(dense.model, splits, sparsity=0.5, uq=method, epochs=0)
    result = cuq.finetune(network(), small, method=method, epochs=8, batch_size=32)
    with pytest.raises(UncertaintyError, match="training images"):
        cuq.fit_uncertainty(result)
    shapes = cuq.prune(result, torch.randn(1, *SHAPE), sparsity=0.5, round_to=1)
    with pytest.raises(UncertaintyError, match="prune before it"):
        method.fit(trained(shapes.model, small, result.observed))


def test_a_network_without_batch_norm_needs_no_images(small):
    plain = own("mlp", SHAPE, widths=(8,))
    result = cuq.finetune(plain, small, method=TRADI(samples=2), epochs=2)
    assert cuq.fit_uncertainty(result).members.count == 2


@pytest.mark.parametrize("method", CONFIGURED, ids=ids(CONFIGURED))
def test_several_models_are_refused(method, small):
    with pytest.raises(UncertaintyError, match="takes one model, 2 were given"):
        cuq.fit_uncertainty([network(), network()], small, method=method)


def test_laplace_refuses_what_it_cannot_do(small):
    with pytest.raises(UncertaintyError, match="training images"):
        Laplace().fit(trained(network()))
    no_calibration = Trained((network(),), Origin(SHAPE), train=small.train)
    with pytest.raises(UncertaintyError, match="calibration split"):
        Laplace(prior_precision="held-out").fit(no_calibration)
    with pytest.raises(UncertaintyError, match="classifier"):
        Laplace().fit(Trained((network(),), Origin(), train=small.train))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (TRADI, {"samples": 0}), (TRADI, {"start": "mean"}), (TRADI, {"observation_noise": -1.0}),
        (SWAG, {"rank": 1}), (SWAG, {"snapshots": 10}), (SWAG, {"share": 0.0}), (SWAG, {"scale": "auto"}),
        (GaussianPerturbation, {"scale": "automatic"}), (GaussianPerturbation, {"scale": -0.1}),
        (GaussianPerturbation, {"norm_batches": -1}),
        (Laplace, {"prior_precision": 0.0}), (Laplace, {"prior_precision": "marglik"}),
    ],
)  # fmt: skip
def test_impossible_options(kind, options):
    with pytest.raises(InputError, match=str(next(iter(options.values())))):
        kind(**options)


def test_options_come_as_texts():
    method, unused = configure_method("swag", {"samples": 4, "dropout": 0.1, "seed": 3}, {"rank": "0", "scale": "1"})
    assert method == SWAG(samples=4, rank=0, scale=1.0, seed=3)
    assert unused == ("dropout",)
    assert configured(GaussianPerturbation, {"scale": "0.1"}).scale == 0.1
    assert configured(GaussianPerturbation, {"scale": "auto"}).scale == "auto"
    with pytest.raises(UnknownNameError, match="rank"):
        configure_method("swag", {}, {"ranks": "3"})
    assert all(configured(METHODS[name], {}) is not None for name in METHODS.names)
