"""Certificates: against brute force and closed forms, on printed figures, in the limit, and from end to end."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import brentq
from scipy.stats import binom
from torch import nn
from torch.utils.data import Subset, TensorDataset

import compress_uq as cuq
from compress_uq.calibration import Temperature
from compress_uq.config import Guarantees
from compress_uq.data import divide
from compress_uq.deciding import check_decisions
from compress_uq.decisions import LAC, RAPS, SET_RULES, SGR, binomial_bound, conformal_rank, smallest_risk
from compress_uq.errors import DataError, DecisionError, GateError, InputError, UnknownNameError
from compress_uq.export.gates import check_graph
from compress_uq.metrics import wilson
from compress_uq.report.decisions import broken, decision_figures
from compress_uq.runtime import OnnxPredictor
from compress_uq.stages import Origin
from compress_uq.types import OUTPUT_NAMES, Prediction
from compress_uq.uncertain import UncertainModel
from compress_uq.uq import MSP, Trained

# Who looks at what.


@pytest.mark.parametrize(("count", "classes", "parts"), [(100, 4, 3), (7, 10, 2), (5000, 10, 3), (3, 1, 3)])
def test_parts_share_no_image_and_leave_none_out(count, classes, parts):
    labels = np.random.default_rng(0).integers(0, classes, count)
    divided = divide(labels, parts)
    assert sorted(itertools.chain(*divided)) == list(range(count))
    assert max(map(len, divided)) - min(map(len, divided)) <= 1
    for k in range(classes):
        of_class = [int((labels[part] == k).sum()) for part in divided]
        assert max(of_class) - min(of_class) <= 1
    assert divided == divide(labels, parts)
    with pytest.raises(DataError, match="cannot be divided"):
        divide(labels, count + 1)


def numbered(count, classes=4):
    return TensorDataset(torch.arange(count).float().reshape(-1, 1, 1, 1), torch.arange(count) % classes)


def used(dataset):
    return {int(dataset[i][0]) for i in range(len(dataset))}


@pytest.mark.parametrize("rules", [1, 2])
def test_a_decision_split_is_set_aside_before_the_calibrator_is_fitted(rules):
    splits = cuq.set_aside(cuq.Splits(calibration=Subset(numbered(2000), range(900))), rules=rules)
    assert len(splits.calibration) == 900 // (1 + rules)
    assert used(splits.calibration) | used(splits.decision) == set(range(900))
    assert used(splits.calibration).isdisjoint(used(splits.decision))
    assert "are the decision split" in splits.info.calibration
    assert cuq.set_aside(splits, rules=rules) is splits


def test_nothing_is_set_aside_where_it_is_not_asked_for_or_too_small():
    given = cuq.Splits(calibration=numbered(599), decision=None)
    assert cuq.set_aside(given, rules=0) is given
    assert cuq.set_aside(given, rules=2) is given
    assert cuq.set_aside(given, rules=1).decision is not None


# Acceptance.


@pytest.mark.parametrize(("wrong", "accepted", "delta"), [(0, 10, 0.05), (3, 40, 0.01), (17, 30, 0.2), (30, 30, 0.05)])
def test_the_bound_inverts_the_binomial_tail(wrong, accepted, delta):
    bound = binomial_bound(wrong, accepted, delta)
    if wrong == accepted:
        assert bound == 1
        return
    root = brentq(lambda b: binom.cdf(wrong, accepted, b) - delta, 1e-9, 1 - 1e-9, xtol=1e-13)
    assert bound == pytest.approx(root, abs=1e-9)
    if wrong == 0:
        assert bound == pytest.approx(1 - delta ** (1 / accepted))


def upper(errors, count, part):
    return brentq(lambda b: binom.cdf(errors, count, b) - part, 0, 1) if errors < count else 1.0


def brute_force(uncertainty, wrong, delta):
    """What every threshold accepts, and its bound at the part of delta that each one visited gets."""
    part = delta / (1 + math.ceil(math.log2(len(wrong))))
    chosen = {float(threshold): uncertainty <= threshold for threshold in np.unique(uncertainty)}
    return {t: (int(a.sum()), upper(int(wrong[a].sum()), int(a.sum()), part)) for t, a in chosen.items()}


@pytest.mark.parametrize("seed", range(20))
def test_sgr_against_every_threshold(seed):
    random = np.random.default_rng(seed)
    count = int(random.integers(60, 300))
    uncertainty = random.random(count).astype(np.float32)
    if seed % 2:
        uncertainty = np.round(uncertainty, 1).astype(np.float32)  # ties
    wrong = random.random(count) < uncertainty**2 * 0.6
    every = brute_force(uncertainty, wrong, 0.1)
    rule = SGR.fit(uncertainty, wrong, risk=0.3, delta=0.1)
    certified = {t: accepted for t, (accepted, bound) in every.items() if bound <= 0.3}
    accepted, bound = every[float(rule.threshold)]
    assert float(rule.threshold) in certified
    assert rule.options["bound"] == pytest.approx(bound, abs=1e-9)
    assert rule.options["coverage"] == accepted / count
    assert int(rule(torch.from_numpy(uncertainty)).sum()) == accepted
    # Where the certified thresholds are one run of them, bisection finds its end.
    inside = [every[t][1] <= 0.3 for t in sorted(every) if every[t][0] >= min(certified.values())]
    if inside == sorted(inside, reverse=True):
        assert accepted == max(certified.values())


@pytest.mark.parametrize("seed", range(10))
def test_the_smallest_risk_named_is_the_smallest_there_is(seed):
    random = np.random.default_rng(seed)
    uncertainty = random.random(80).astype(np.float32)
    wrong = random.random(80) < uncertainty * (seed % 4) / 4
    with pytest.raises(DecisionError) as caught:
        SGR.fit(uncertainty, wrong, risk=0.01)
    least = float(str(caught.value).split("the smallest is ")[1].split(",")[0])
    assert least >= smallest_risk(80, 0.05)
    again = SGR.fit(uncertainty, wrong, risk=least)
    assert f"coverage of {again.options['coverage']:.3f}" in str(caught.value)
    with pytest.raises(DecisionError):
        SGR.fit(uncertainty, wrong, risk=least - 2e-4)


def test_a_monotone_map_changes_no_decision():
    random = np.random.default_rng(0)
    uncertainty = random.random(500).astype(np.float32)
    wrong = random.random(500) < uncertainty * 0.3
    plain, mapped = (SGR.fit(u, wrong, risk=0.2) for u in (uncertainty, np.exp(5 * uncertainty)))
    assert plain.options == mapped.options
    a, b = plain(torch.from_numpy(uncertainty)), mapped(torch.from_numpy(np.exp(5 * uncertainty)))
    assert torch.equal(a, b)
    assert plain.options["images"] == 500


def test_in_the_limit_sgr_accepts_all_that_the_risk_allows():
    """Errors with probability u, u uniform: accepting u <= t has risk t / 2, so risk 0.1 allows a coverage of 0.2."""
    random = np.random.default_rng(0)
    uncertainty = random.random(400_000).astype(np.float32)
    rule = SGR.fit(uncertainty, random.random(400_000) < uncertainty, risk=0.1)
    assert float(rule.threshold) == pytest.approx(0.2, abs=0.01)
    assert rule.options["coverage"] < 0.2


def test_a_risk_that_cannot_be_certified_is_refused_with_the_smallest_that_can():
    sure, right = np.linspace(0, 1, 36, dtype=np.float32), np.zeros(36, bool)
    least = 1 - (0.05 / 7) ** (1 / 36)
    assert smallest_risk(36, 0.05) == pytest.approx(least)
    with pytest.raises(
        DecisionError, match=rf"risk 0.05 .* 36 images .* smallest is {least + 5e-5:.4f}.* coverage of 1.0"
    ):
        SGR.fit(sure, right, risk=0.05)
    assert SGR.fit(sure, right, risk=least + 1e-4).options["coverage"] == 1
    for risk, delta in ((0, 0.05), (1, 0.05), (0.1, 0), (0.1, 1.5), (math.nan, 0.05)):
        with pytest.raises(DecisionError, match="above 0 and below 1"):
            SGR.fit(sure, right, risk=risk, delta=delta)
    for values in (np.full(36, np.nan, np.float32), np.full(36, np.inf, np.float32), np.zeros(0, np.float32), sure[:5]):
        with pytest.raises(DecisionError):
            SGR.fit(values, right[: len(values)] if len(values) != 5 else right, risk=0.5)
    with pytest.raises(DecisionError, match="before it was fitted"):
        SGR()(torch.zeros(1))


# Sets.


def simplex(count, classes, seed=0, sharpness=2.0):
    random = np.random.default_rng(seed)
    logits = random.normal(size=(count, classes)) * sharpness
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([random.choice(classes, p=row) for row in p])
    return p.astype(np.float32), labels


def test_lac_by_hand():
    p = np.float32([[0.9, 0.1, 0.0], [0.6, 0.3, 0.1], [0.4, 0.5, 0.1], [0.2, 0.1, 0.7], [0.3, 0.4, 0.3]])
    labels = np.array([0, 1, 0, 2, 2])
    # Of the truths two are answers and count as 1; the third and fourth largest are 0.4 and 0.3.
    rule = LAC.fit(p, labels, coverage=0.5)
    assert float(rule.threshold) == pytest.approx(0.4)
    assert rule(torch.from_numpy(p)).int().tolist() == [[1, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 1, 0]]
    assert float(LAC.fit(p, labels, coverage=4 / 6).threshold) == pytest.approx(0.3)
    # The answers alone are right often enough: nothing else is named, and nothing is left empty.
    alone = LAC.fit(p, labels, coverage=0.3)
    assert alone(torch.from_numpy(p)).sum(1).tolist() == [1] * 5


def test_raps_by_hand():
    p = np.float32([[0.5, 0.3, 0.15, 0.05], [0.1, 0.6, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
    labels = np.array([1, 2, 3])
    options = {"penalty": 0.1, "free": 1}
    # Above the truths stand 0.5, 0.6 and nothing, each of rank 2, 2 and 1: scores 0.6, 0.7 and 0.
    rule = RAPS.fit(p, labels, coverage=0.5, options=options)
    assert float(rule.threshold) == pytest.approx(0.6)
    wanted = [[1, 1, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1]]
    assert rule(torch.from_numpy(p)).int().tolist() == wanted
    assert rule.options == {"coverage": 0.5, "images": 3, **options}


@pytest.mark.parametrize("seed", range(5))
def test_raps_holds_the_classes_that_score_at_most_the_threshold(seed):
    p, labels = simplex(300, 7, seed)
    options = {"penalty": 0.03, "free": 2}
    scores = np.empty_like(p, np.float64)
    for i, row in enumerate(p.astype(np.float64)):
        for k in range(7):
            scores[i, k] = row[row > row[k]].sum() + 0.03 * max(0, (row > row[k]).sum() + 1 - 2)
    threshold = np.sort(scores[np.arange(300), labels])[conformal_rank(300, 0.8) - 1]
    rule = RAPS.fit(p, labels, coverage=0.8, options=options)
    assert float(rule.threshold) == pytest.approx(threshold, abs=1e-6)
    clear = np.abs(scores - threshold) > 1e-6
    assert np.array_equal(rule(torch.from_numpy(p)).numpy()[clear], (scores <= threshold)[clear])


@pytest.mark.parametrize("name", SET_RULES.names)
def test_sets_hold_the_truth_as_often_as_asked_for(name):
    for coverage in (0.5, 0.8, 0.95):
        p, labels = simplex(40_000, 10, sharpness=1.5)
        rule = SET_RULES[name].fit(p[:20_000], labels[:20_000], coverage=coverage)
        sets = rule(torch.from_numpy(p[20_000:])).numpy()
        held = sets[np.arange(20_000), labels[20_000:]].mean()
        noise = 4 * math.sqrt(coverage * (1 - coverage) * (1 / 20_000 + 1 / 16_000))
        accuracy = (p.argmax(1) == labels).mean()
        assert held > coverage - noise
        # An answer is always named, so the coverage is at least the accuracy.
        assert held < max(coverage, accuracy) + noise
        assert sets.any(1).all()
        assert sets[np.arange(20_000), p[20_000:].argmax(1)].all()


@pytest.mark.parametrize("name", SET_RULES.names)
def test_sets_do_not_depend_on_the_order_of_classes_or_images(name):
    p, labels = simplex(500, 6)
    classes, rows = np.random.default_rng(1).permutation(6), np.random.default_rng(2).permutation(500)
    options = {"penalty": 0.1, "free": 2} if name == "raps" else None
    plain = SET_RULES[name].fit(p, labels, coverage=0.9, options=options)
    moved = SET_RULES[name].fit(p[rows][:, classes], np.argsort(classes)[labels[rows]], coverage=0.9, options=options)
    assert float(plain.threshold) == pytest.approx(float(moved.threshold), abs=1e-6)
    a, b = plain(torch.from_numpy(p))[:, classes], moved(torch.from_numpy(np.ascontiguousarray(p[:, classes])))
    assert (a != b).float().mean() < 2e-3


def test_raps_chooses_options_on_images_that_have_no_say_in_the_threshold():
    p, labels = simplex(1000, 10)
    rule = RAPS.fit(p, labels, coverage=0.9)
    assert rule.options["images"] == 800
    rest = sorted(itertools.chain(*divide(labels, 5)[1:]))
    chosen = {name: rule.options[name] for name in ("penalty", "free")}
    assert float(rule.threshold) == float(RAPS.fit(p[rest], labels[rest], coverage=0.9, options=chosen).threshold)
    assert RAPS.fit(p, labels, coverage=0.9, options={"free": 4}).options["free"] == 4
    assert RAPS.fit(p, labels, coverage=0.9, options={"penalty": 0.3}).options["penalty"] == 0.3


@pytest.mark.parametrize("name", SET_RULES.names)
def test_a_coverage_that_cannot_be_had_is_refused_with_the_highest_that_can(name):
    p, labels = simplex(100, 5)
    kind, options = SET_RULES[name], {"penalty": 0.1, "free": 2} if name == "raps" else None
    with pytest.raises(DecisionError, match=r"coverage 0.995 .* 100 images: the highest is 0.9901"):
        kind.fit(p, labels, coverage=0.995, options=options)
    assert kind.fit(p, labels, coverage=100 / 101, options=options)
    for coverage in (0.0, 1.0, 1.5, -0.1, math.nan):
        with pytest.raises(DecisionError, match="above 0 and below 1"):
            kind.fit(p, labels, coverage=coverage, options=options)
    with pytest.raises(DecisionError, match="NaN"):
        kind.fit(p * np.float32(np.nan), labels, coverage=0.9, options=options)
    with pytest.raises(UnknownNameError, match="option of"):
        kind.fit(p, labels, coverage=0.9, options={"penlty": 1.0})
    with pytest.raises(DecisionError, match="before it was fitted"):
        kind()(torch.from_numpy(p))


def test_raps_options_that_cannot_be_are_refused():
    p, labels = simplex(100, 5)
    with pytest.raises(DecisionError, match="0 or more"):
        RAPS.fit(p, labels, coverage=0.9, options={"penalty": -1.0, "free": 2})
    with pytest.raises(DecisionError, match="too few"):
        RAPS.fit(p[:9], labels[:9], coverage=0.8)


# Two public CIFAR-100 networks.


def tempered(folder, name, fitted_on):
    """Probabilities (10000, 100) after a temperature that was fitted on some of them, and labels."""
    with np.load(folder / "predictions" / f"cifar100-{name}.npz") as record:
        logits, labels = np.log(np.clip(record["predictions"].astype(np.float64), 1e-30, 1)), record["ground_truth"]
    scaled = torch.from_numpy(logits / Temperature.fit(logits[None, fitted_on], labels[fitted_on]).temperature)
    return torch.softmax(scaled, 1).float().numpy(), labels


@pytest.mark.parametrize(
    ("name", "coverage", "risk", "size"),
    [("densenet-bc-100", 0.530, 0.045, 2.05), ("wideresnet-16-4", 0.496, 0.036, 2.2)],
)
def test_printed_figures_of_public_predictions(real_data, name, coverage, risk, size):
    """Risk 0.05 at delta 0.05 and coverage 0.9, half of the images to fit on; printed for one split, so roughly."""
    first, second = np.arange(5000), np.arange(5000, 10000)
    p, labels = tempered(real_data, name, first)
    uncertainty, wrong = 1 - p.max(1), p.argmax(1) != labels
    rule = SGR.fit(uncertainty[first], wrong[first], risk=0.05)
    accepted = rule(torch.from_numpy(uncertainty[second])).numpy()
    assert accepted.mean() == pytest.approx(coverage, abs=0.02)
    assert wrong[second][accepted].mean() == pytest.approx(risk, abs=0.01)
    sets = LAC.fit(p[first], labels[first], coverage=0.9)(torch.from_numpy(p[second])).numpy()
    assert sets.sum(1).mean() == pytest.approx(size, abs=0.12)
    assert sets[np.arange(5000), labels[second]].mean() == pytest.approx(0.9, abs=0.012)
    raps = RAPS.fit(p[first], labels[first], coverage=0.9, options={"penalty": 0.01, "free": 5})
    assert raps(torch.from_numpy(p[second])).sum(1).float().mean() < 3.4  # 6.5 where a class's own share counts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["densenet-bc-100", "wideresnet-16-4"])
def test_certificates_hold_over_random_splits(real_data, name):
    """200 splits; the 10,000 images are the population whose risk and coverage were promised something."""
    splits, fitted, delta, risk, coverage = 200, 2000, 0.05, 0.05, 0.9
    p, labels = tempered(real_data, name, np.arange(10_000))
    probabilities = torch.from_numpy(p)
    uncertainty, wrong = 1 - p.max(1), p.argmax(1) != labels
    violated = naive = 0
    held = {"lac": [], "raps": []}
    for seed in range(splits):
        drawn = np.random.default_rng(seed).permutation(10_000)
        inside, outside = drawn[:fitted], drawn[fitted:]
        accepted = SGR.fit(uncertainty[inside], wrong[inside], risk=risk, delta=delta)(
            torch.from_numpy(uncertainty)
        ).numpy()
        violated += wrong[accepted].mean() > risk
        # What a bound is for: the largest coverage whose risk was within bounds on the same images.
        ranked = inside[np.argsort(uncertainty[inside])]
        within = np.flatnonzero(np.cumsum(wrong[ranked]) / np.arange(1, fitted + 1) <= risk)
        naive += wrong[uncertainty <= uncertainty[ranked[within[-1]]]].mean() > risk
        for kind in held:
            sets = SET_RULES[kind].fit(p[inside], labels[inside], coverage=coverage)(probabilities[outside]).numpy()
            held[kind].append(sets[np.arange(len(outside)), labels[outside]].mean())
    assert violated <= delta * splits
    assert naive > delta * splits
    for kind, coverages in held.items():
        error = np.std(coverages) / math.sqrt(splits)
        assert np.mean(coverages) > coverage - 3 * error, kind
        assert np.mean(coverages) < coverage + 1 / (0.8 * fitted) + 3 * error, kind


@pytest.mark.slow
def test_sgr_holds_on_few_images():
    """Drawn afresh each time, errors with probability u / 2 and u uniform: accepting u <= t has the risk t / 4."""
    random, delta, violated, certified = np.random.default_rng(0), 0.2, 0, 0
    for _ in range(1000):
        uncertainty = random.random(200).astype(np.float32)
        try:
            rule = SGR.fit(uncertainty, random.random(200) < 0.5 * uncertainty, risk=0.15, delta=delta)
        except DecisionError:
            continue
        certified += 1
        violated += float(rule.threshold) / 4 > 0.15
    assert certified > 400
    assert violated <= delta * 1000


# From end to end.


SHAPE = (1, 4, 4)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def world(network, count, seed, sharpness=12.0):
    """Images, and labels drawn from a softened softmax of the network's own logits."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, *SHAPE, generator=generator)
    with torch.no_grad():
        labels = torch.multinomial(torch.softmax(sharpness * network(pixels), 1), 1, generator=generator)[:, 0]
    return TensorDataset(pixels, labels)


@pytest.fixture(scope="module")
def splits(network):
    return cuq.Splits(calibration=world(network, 600, 1), decision=world(network, 800, 2), test=world(network, 4000, 3))


@pytest.fixture(scope="module")
def uncertain(network, splits):
    origin = Origin(SHAPE).of_data(splits)
    return cuq.calibrate(UncertainModel(MSP().fit(Trained((network,), origin)), MSP(), origin), splits)


@pytest.fixture(scope="module", params=SET_RULES.names)
def decided(request, uncertain, splits):
    return cuq.decide(uncertain, splits, risk=0.15, coverage=0.9, sets=request.param)


def test_decisions_keep_their_promise_on_test(decided, splits):
    evaluation = cuq.evaluate(decided, splits)
    figures = evaluation.to_json()["decisions"]
    assert figures["selective_risk"]["value"] <= 0.15
    assert figures["acceptance_coverage"]["value"] == pytest.approx(decided.acceptance.options["coverage"], abs=0.06)
    assert figures["set_coverage"]["value"] == pytest.approx(0.9, abs=0.04)
    assert figures["set_empty"]["value"] == 0
    assert 1 <= figures["set_size"]["low"] <= figures["set_size"]["value"] <= 4
    assert all(f["low"] <= f["value"] <= f["high"] for f in figures.values())
    assert evaluation.prediction.accepted.dtype == evaluation.prediction.prediction_set.dtype == bool
    assert cuq.evaluate(decided.but(acceptance=None), splits).prediction.prediction_set.shape == (4000, 4)


def test_each_rule_looks_at_its_own_half(uncertain, splits, decided):
    labels = splits.decision.tensors[1].numpy()
    first, second = divide(labels, 2)
    with torch.no_grad():
        answers = uncertain(splits.decision.tensors[0])
    u, p = answers.uncertainty.numpy(), answers.probabilities.numpy()
    wrong = answers.label.numpy() != labels
    assert float(decided.acceptance.threshold) == pytest.approx(
        float(SGR.fit(u[first], wrong[first], risk=0.15).threshold)
    )
    wanted = SET_RULES[decided.sets.name].fit(p[second], labels[second], coverage=0.9)
    assert float(decided.sets.threshold) == pytest.approx(float(wanted.threshold), abs=1e-6)
    assert decided.record["acceptance"]["from"] == "the decision split (half 1 of 2, 400 images)"
    assert decided.record["sets"]["from"] == "the decision split (half 2 of 2, 400 images)"
    assert decided.record["sets"]["exact"]
    alone = cuq.decide(uncertain, splits, risk=0.15)
    assert (alone.acceptance.options["images"], alone.sets) == (800, None)


def test_without_a_decision_split_calibration_is_cross_fitted(uncertain, splits):
    calibration = cuq.Splits(calibration=splits.calibration)
    crossed = cuq.decide(uncertain, calibration, risk=0.2, coverage=0.9)
    images, labels = splits.calibration.tensors[0], splits.calibration.tensors[1].numpy()
    first, second = divide(labels, 2)
    logits = uncertain.member_logits(images).numpy()

    def answers(fitted_on, applied_to):
        other = Temperature.fit(logits[:, fitted_on], labels[fitted_on])
        return torch.softmax(other.logits(torch.from_numpy(logits[0, applied_to])), 1).numpy()

    p, q = answers(second, first), answers(first, second)
    rule = SGR.fit(1 - p.max(1), p.argmax(1) != labels[first], risk=0.2)
    assert float(crossed.acceptance.threshold) == pytest.approx(float(rule.threshold), abs=1e-5)
    wanted = LAC.fit(q, labels[second], coverage=0.9)
    assert float(crossed.sets.threshold) == pytest.approx(float(wanted.threshold), abs=1e-5)
    assert not crossed.record["sets"]["exact"]
    assert "approximate" in crossed.record["sets"]["from"]
    # Where no calibrator saw the images there is nothing to cross.
    bare = cuq.decide(cuq.calibrate(uncertain, calibration, method="none"), calibration, risk=0.2)
    assert bare.record["acceptance"]["exact"]
    assert bare.acceptance.options["images"] == 600
    # Members that were chosen on the images leave the guarantee approximate.
    for method in (cuq.uq.GaussianPerturbation(samples=2), cuq.uq.GaussianPerturbation(samples=2, scale=0.1)):
        model = cuq.fit_uncertainty(
            uncertain.members.network, cuq.Splits(train=splits.test, calibration=splits.calibration), method=method
        )
        recorded = cuq.decide(model, calibration, coverage=0.8).record["sets"]
        assert recorded["exact"] is (method.scale == 0.1)
        assert ("gaussian chose its members" in recorded["from"]) is (method.scale == "auto")
    # A score of features is fitted on training images, and crossed with the rest.
    by_features = cuq.choose_scores(uncertain, cuq.Splits(train=splits.test), score="knn")
    crossed = cuq.decide(by_features, calibration, risk=0.5)
    with torch.no_grad():
        assert crossed(images).accepted.float().mean().item() == pytest.approx(crossed.acceptance.options["coverage"])


@pytest.mark.parametrize("label", [-1, 12])
@pytest.mark.parametrize("calibration", ["none", "temperature"])
def test_labels_that_are_no_classes_are_refused(label, calibration, uncertain, splits):
    images, labels = (tensor.clone() for tensor in splits.calibration.tensors)
    model = cuq.calibrate(uncertain, splits, method=calibration)
    labels[3] = label
    for wrong in (
        cuq.Splits(calibration=TensorDataset(images, labels)),
        cuq.Splits(decision=TensorDataset(images, labels)),
    ):
        with pytest.raises(DataError, match=f"label.*{label}"):
            cuq.decide(model, wrong, coverage=0.9)


@pytest.mark.parametrize("name", SET_RULES.names)
def test_sets_are_not_fitted_on_what_are_no_probabilities(name):
    p, labels = np.full((40, 4), 0.25), np.arange(40) % 4
    with pytest.raises(DataError, match="sums to 1.3"):
        SET_RULES[name].fit(p * 1.3, labels, coverage=0.8)
    with pytest.raises(DataError, match="labels from -1"):
        SET_RULES[name].fit(p, labels - 1, coverage=0.8)
    with pytest.raises(DataError, match="expected .N, K."):
        SET_RULES[name].fit(p[:, 0], labels, coverage=0.8)


@pytest.mark.parametrize(("n", "images"), [(200, 8000), (2000, 10_000)])
def test_a_kept_promise_of_coverage_is_doubted_in_one_run_of_forty(n, images):
    random, doubts = np.random.default_rng(0), 0
    rank = conformal_rank(n, 0.9)
    for covered in random.beta(rank, n + 1 - rank, size=400):  # the coverage of one rule, known exactly
        figures = {"set_coverage": wilson(random.binomial(images, covered) / images, images)}
        doubts += bool(broken(figures, {"sets": {"images": n, "coverage": 0.9}}, images))
    assert doubts <= 400 * 0.025 + 3 * np.sqrt(400 * 0.025)
    assert broken({"set_coverage": wilson(0.8, images)}, {"sets": {"images": n, "coverage": 0.9}}, images)


def test_images_that_choose_options_are_not_counted_on_before_the_work(splits):
    few = cuq.Splits(decision=Subset(splits.decision, range(240)))
    for options in (None, {"penalty": 0.1, "free": 2}):
        asked = Guarantees(coverage=0.995, sets="raps", options=options)
        if options is None:
            with pytest.raises(DecisionError, match="192 images: the highest is 0.9948"):
                check_decisions(asked, splits=few)
        else:
            check_decisions(asked, splits=few)


def test_decisions_are_exported_and_gated(decided, splits, tmp_path):
    cuq.export_onnx(decided, tmp_path / "m.onnx")
    predictor = OnnxPredictor(tmp_path / "m.onnx")
    images = splits.test.tensors[0]
    with torch.no_grad():
        wanted = decided(images)
    got = predictor(images.numpy())
    assert got.accepted.dtype == got.prediction_set.dtype == bool
    near = np.abs(wanted.uncertainty.numpy() - float(decided.acceptance.threshold)) < 1e-5
    assert (got.accepted == wanted.accepted.numpy())[~near].all()
    assert (got.prediction_set == wanted.prediction_set.numpy()).mean() > 0.9999
    recorded = predictor.metadata
    assert recorded["outputs"] == [*OUTPUT_NAMES, "accepted", "prediction_set"]
    assert recorded["thresholds"]["accepted"]["threshold"] == float(decided.acceptance.threshold)
    assert recorded["thresholds"]["prediction_set"]["rule"] == decided.sets.name
    assert recorded["answers"] == json.loads(json.dumps(decided.record))
    a, b = cuq.evaluate(decided, splits).decisions, cuq.evaluate(predictor, splits).decisions
    assert {k: f.value for k, f in a.items()} == pytest.approx({k: f.value for k, f in b.items()}, abs=1e-3)


def test_one_rule_alone_has_its_own_output(uncertain, splits, tmp_path):
    for asked, name in (({"risk": 0.2}, "accepted"), ({"coverage": 0.8}, "prediction_set")):
        model = cuq.decide(uncertain, splits, **asked)
        cuq.export_onnx(model, tmp_path / f"{name}.onnx")
        predictor = OnnxPredictor(tmp_path / f"{name}.onnx")
        assert predictor.metadata["outputs"] == [*OUTPUT_NAMES, name]
        answer = predictor(splits.test.tensors[0][:3].numpy())
        given = {field for field in Prediction._fields[8:] if getattr(answer, field) is not None}
        assert given == {name}


@pytest.mark.parametrize("output", ["accepted", "prediction_set"])
def test_a_file_that_decides_otherwise_does_not_pass(output, uncertain, splits, tmp_path):
    asked = {"risk": 0.2} if output == "accepted" else {"coverage": 0.8}
    model = cuq.decide(uncertain, splits, **asked)
    cuq.export_onnx(model, tmp_path / "m.onnx")
    content = (tmp_path / "m.onnx").read_bytes()
    assert "parity" in check_graph(content, model)
    part = "acceptance" if output == "accepted" else "sets"
    rule = getattr(model, part)
    other = type(rule)(rule.options, threshold=torch.tensor(-0.5))  # accepts nothing, and names every class
    with pytest.raises(GateError, match=f"gate 'parity': {output} differs"):
        check_graph(content, model.but(**{part: other}))


def test_what_no_images_could_give_is_refused_at_once(uncertain, splits):
    with pytest.raises(DecisionError, match="neither risk nor coverage"):
        cuq.decide(uncertain, splits)
    with pytest.raises(DataError, match="'calibration'"):
        cuq.decide(uncertain, cuq.Splits(test=splits.test), risk=0.1)
    with pytest.raises(DecisionError, match="smallest is"):
        cuq.decide(uncertain, splits, risk=0.0001)
    with pytest.raises(DecisionError, match="highest is 0.9988"):
        cuq.decide(uncertain, splits, coverage=0.9999)
    with pytest.raises(DecisionError, match="all classes always"):
        cuq.decide(uncertain, splits, coverage=1.0)
    with pytest.raises(UnknownNameError, match="did you mean 'raps'"):
        cuq.decide(uncertain, splits, coverage=0.9, sets="rap")
    with pytest.raises(InputError, match="option of lac"):
        cuq.decide(uncertain, splits, coverage=0.9, options={"penalty": 1.0})


def test_recalibrating_takes_decisions_away(decided, splits):
    again = cuq.calibrate(decided, splits)
    assert (again.acceptance, again.sets, again.record) == (None, None, {})


def test_no_accepted_image_has_no_risk():
    nothing = Prediction(*[np.zeros(3)] * 8, accepted=np.zeros(3, bool))
    figures = decision_figures(nothing, np.zeros(3, int))
    assert figures["acceptance_coverage"].value == 0
    assert math.isnan(figures["selective_risk"].value)
    assert figures["selective_risk"].to_json() == {"value": None, "low": None, "high": None}


def test_a_broken_promise_is_said():
    promised = {"acceptance": {"risk": 0.05}, "sets": {"coverage": 0.9, "images": 500}}
    kept = {"selective_risk": wilson(0.06, 500), "set_coverage": wilson(0.88, 500)}
    assert broken(kept, promised, 500) == broken({}, promised, 500) == broken(kept, {}, 500) == []
    missed = {"selective_risk": wilson(0.1, 500), "set_coverage": wilson(0.8, 500)}
    first, second = broken(missed, promised, 500)
    assert "0.1000 on test" in first
    assert "0.8000 of the labels" in second


def test_compress_sets_the_images_of_its_rules_aside(network):
    given = cuq.Splits(train=world(network, 100, 4), calibration=world(network, 900, 5), test=world(network, 300, 6))
    bundle = cuq.compress(
        network, given, sparsity=0.5, uq="msp", epochs=0, risk=0.6, coverage=0.8, score="energy", ood_score="gen"
    )
    recipe = bundle.recipe
    assert recipe["data"]["images"] == {"train": 100, "calibration": 300, "decision": 600, "test": 300}
    assert recipe["answers"]["acceptance"]["from"] == "the decision split (half 1 of 2, 300 images)"
    assert recipe["answers"]["sets"]["exact"]
    assert "600 of them are the decision split" in recipe["data"]["calibration"]
    assert (
        "uncertainty = energy; ood_score = gen; of the dense columns"
        in bundle.report.to_json()["conventions"]["scores"]
    )
    # The rules are those of the splits as they were divided, and the calibrator saw no other image.
    divided = cuq.set_aside(given, rules=2)
    again = cuq.calibrate(bundle.model, divided)
    assert float(again.calibrator.log_temperature) == pytest.approx(
        float(bundle.model.calibrator.log_temperature), abs=1e-5
    )
    again = cuq.decide(again, divided, risk=0.6, coverage=0.8)
    assert float(again.acceptance.threshold) == pytest.approx(float(bundle.model.acceptance.threshold), abs=1e-5)


def test_what_cannot_be_certified_after_training_costs_the_rule_and_no_more(network):
    given = cuq.Splits(train=world(network, 100, 4), calibration=world(network, 300, 5), test=world(network, 100, 6))
    bundle = cuq.compress(network, given, sparsity=0.5, uq="msp", epochs=0, risk=0.04, coverage=0.8)
    assert (bundle.model.acceptance, bundle.model.sets is None) == (None, False)
    (warning,) = (w for w in bundle.report.to_json()["warnings"] if "without a decision rule" in w)
    assert "compressed goes without" in warning
    assert "the smallest is" in warning


def test_the_command_line_decides_from_prune_to_predict(command, checkpoint, tmp_path):
    code, out, err = command(
        "prune", checkpoint, "--sparsity", 0.5, "--epochs", 1, "--samples", 4, "--risk", 0.4, "--coverage", 0.9, "--sets",
        "raps", "--score", "entropy", "--ood-score", "auto", "--validation-ood", "synthetic", "--json",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    answers = report["recipe"]["answers"]
    assert (report["recipe"]["risk"], report["recipe"]["sets"]) == (0.4, "raps")
    assert answers["score"] == "entropy"
    assert answers["ood_score"] == answers["ood_score_choice"]["chosen"]
    assert "synthetic" in report["conventions"]["scores"]
    assert report["conventions"]["accepted"].startswith("sgr: the risk of accepted answers is at most 0.4")
    assert "at least 0.9" in report["conventions"]["prediction_set"]
    assert set(report["onnx"]["decisions"]) == set(report["compressed"]["decisions"]) >= {"selective_risk", "set_size"}
    assert report["dense"]["decisions"] == {}
    assert "selective_risk" in err
    bundle = cuq.Bundle.load(tmp_path / "model-compressed")
    assert "selective_risk" in bundle.report.to_markdown()
    assert bundle.model.record == {k: v for k, v in answers.items() if k not in ("score", "ood_score")}
    images = torch.randn(6, 1, 8, 8)
    bundle.save(tmp_path / "again")
    with torch.no_grad():
        first, second = bundle.model(images), cuq.Bundle.load(tmp_path / "again").model(images)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert cuq.verify(tmp_path / "model-compressed").checks["parity"].held
    Image.new("L", (8, 8), 99).save(tmp_path / "a.png")
    code, out, _ = command("predict", "model-compressed", "a.png", "--json")
    (answer,) = json.loads(out)
    assert isinstance(answer["accepted"], bool)
    assert answer["label"] in answer["prediction_set"]
    code, out, err = command("evaluate", "model-compressed", "--json")
    assert json.loads(out)["decisions"]["set_coverage"] == report["onnx"]["decisions"]["set_coverage"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--risk", "0.001"], "even without a wrong answer the smallest is"),
        (["--risk", "2"], "above 0 and below 1"),
        (["--coverage", "1"], "all classes"),
        (["--coverage", "0.9999"], "the highest is"),
        (["--coverage", "0.9", "--sets", "aps"], "unknown set rule 'aps'"),
        (["--score", "entrop"], "did you mean 'entropy'"),
        (["--ood-score", "auto"], "--validation-ood"),
        (["--ood-score", "auto", "--validation-ood", "photographs"], "reported on too"),
    ],
)
def test_what_cannot_be_is_refused_before_any_training(options, words, command, checkpoint, tmp_path):
    code, _, err = command("prune", checkpoint, "--sparsity", 0.5, *options)
    assert code == 2
    assert words in err
    assert not list(tmp_path.iterdir())
