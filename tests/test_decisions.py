"""Certificates: against brute force and closed forms, on printed figures, in the limit, and from end to end."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import binom
from torch.utils.data import Subset, TensorDataset

import compress_uq as cuq
from compress_uq.calibration import Temperature
from compress_uq.data import divide
from compress_uq.decisions import LAC, RAPS, SET_RULES, SGR, binomial_bound, conformal_rank, smallest_risk
from compress_uq.errors import DataError, DecisionError, UnknownNameError

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
    order = np.argsort(uncertainty)
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
    assert order.shape == (10_000,)
    assert violated <= delta * splits
    assert naive > delta * splits
    for kind, coverages in held.items():
        error = np.std(coverages) / math.sqrt(splits)
        assert np.mean(coverages) > coverage - 3 * error, kind
        assert np.mean(coverages) < coverage + 1 / (0.8 * fitted) + 3 * error, kind


@pytest.mark.slow
def test_sgr_holds_on_few_images():
    """Drawn afresh 2,000 times with 60 images, so that the bound itself is at stake and not only its slack."""
    random, delta, violated = np.random.default_rng(0), 0.2, 0
    for _ in range(2000):
        uncertainty = random.random(60).astype(np.float32)
        try:
            rule = SGR.fit(uncertainty, random.random(60) < 0.5 * uncertainty, risk=0.15, delta=delta)
        except DecisionError:
            continue
        violated += float(rule.threshold) / 4 > 0.15
    assert violated <= binom.ppf(0.999, 2000, delta)
