"""Scores against their formulas in float64 and outside implementations, how one is chosen, and that each is exported."""

import json

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.utils.data import Subset, TensorDataset

import compress_uq as cuq
from compress_uq.calibration import Temperature
from compress_uq.cost import Cost
from compress_uq.data import balanced_sample, divide
from compress_uq.errors import DataError, InputError, UncertaintyError, UnknownNameError
from compress_uq.fitted import fitted_record, restore_fitted
from compress_uq.runtime import OnnxPredictor
from compress_uq.scores import (
    KNN,
    SCORES,
    Confidence,
    Energy,
    GeneralisedEntropy,
    RelativeMahalanobis,
    TrainingFeatures,
    ViM,
)  # fmt: skip
from compress_uq.stages import Origin
from compress_uq.uncertain import UncertainModel, answers_of, summarise
from compress_uq.uq import MSP, MCDropout, Networks, Trained

SHAPE = (1, 8, 8)
CLASSES = 4


def answers(probabilities=None, logits=None, features=None):
    p = torch.tensor(probabilities if probabilities is not None else [[0.5, 0.5]])
    raw = p.log()[None] if logits is None else torch.as_tensor(logits, dtype=torch.float32)
    return answers_of(raw, None if features is None else torch.as_tensor(features))._replace(probabilities=p)


def toy(networks=1, count=600, width=12, classes=5, seed=0):
    """Training features of Gaussian classes with one full covariance, and a linear classifier."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, count)
    means, mixing = random.normal(size=(networks, classes, width)) * 2, random.normal(size=(networks, width, width))
    features = means[:, labels] + random.normal(size=(networks, count, width)) @ mixing
    weight = random.normal(size=(networks, classes, width)).astype(np.float32)
    bias = random.normal(size=(networks, classes)).astype(np.float32)
    features = features.astype(np.float32)
    logits = (features @ weight.transpose(0, 2, 1) + bias[:, None]).mean(0)
    return TrainingFeatures(features, labels, logits, weight, bias)


def strangers(training, count=40, seed=1):
    """Features of images that are not like the training images, (G, N, D), and their mean logits."""
    networks, _, width = training.features.shape
    features = (np.random.default_rng(seed).normal(size=(networks, count, width)) * 4).astype(np.float32)
    return features, features @ training.weight.transpose(0, 2, 1) + training.bias[:, None]


def test_scores_of_the_answers_by_hand():
    given = answers([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0]], [[[1.0, 2.0, 3.0], [0, 0, 0]], [[3.0, 2.0, 1.0], [0, 0, 0]]])
    assert Confidence()(given).tolist() == pytest.approx([0.3, 0.0], abs=1e-7)
    assert Energy()(given).tolist() == pytest.approx([-2 - np.log(3), -np.log(3)])
    generalised = 0.21**0.1 + 0.16**0.1 + 0.09**0.1
    assert GeneralisedEntropy()(given)[0].item() == pytest.approx(generalised, rel=1e-6)
    assert GeneralisedEntropy({"top": 2})(given)[0].item() == pytest.approx(0.21**0.1 + 0.16**0.1, rel=1e-6)
    assert GeneralisedEntropy({"gamma": 1.0})(given).tolist() == pytest.approx([0.46, 0.0])
    assert SCORES["mutual-information"]()(given).tolist() == given.mutual_information.tolist()
    assert SCORES["variance"]()(given).tolist() == given.variance.tolist()
    assert given.mutual_information[0] > 0


def test_gen_sees_what_1_minus_p_rounds_away():
    small = np.array([1e-9, 1e-12])
    got = GeneralisedEntropy()(answers(np.float32([[1 - small.sum(), *small]])))
    assert got.item() == pytest.approx((small.sum()) ** 0.1 + (small**0.1).sum(), rel=1e-4)


def test_energy_falls_by_a_shift_and_entropy_ignores_it():
    logits = torch.randn(3, 5, 4)
    plain, shifted = summarise(logits, ood_score=Energy()), summarise(logits + 7, ood_score=Energy())
    assert torch.allclose(plain.ood_score - shifted.ood_score, torch.tensor(7.0), atol=1e-5)
    assert torch.allclose(plain.entropy, shifted.entropy, atol=1e-5)


@pytest.mark.parametrize("networks", [1, 3])
def test_knn_equals_scikit_learn(networks):
    training = toy(networks)
    features, _ = strangers(training)
    fitted = KNN.fit(training, {"bank": 10_000, "neighbours": 3})
    wanted = []
    for bank, given in zip(training.features, features, strict=True):
        search = NearestNeighbors(n_neighbors=3).fit(bank / np.linalg.norm(bank, axis=1, keepdims=True))
        distances, _ = search.kneighbors(given / np.linalg.norm(given, axis=1, keepdims=True))
        wanted.append(distances[:, -1] ** 2 / 2)
    assert np.allclose(fitted(answers(features=features)).numpy(), np.mean(wanted, 0), atol=1e-6)
    assert torch.allclose(fitted(answers(features=features * 9)), fitted(answers(features=features)), atol=1e-6)
    assert fitted.options == {"bank": 600, "neighbours": 3}


def test_the_bank_is_bounded_and_balanced():
    assert KNN.fit(toy(), {"bank": 50}).options == {"bank": 50, "neighbours": 1}
    labels = np.array([0] * 90 + [1] * 5 + [2] * 5)
    chosen = balanced_sample(labels, 30)
    assert np.bincount(labels[chosen]).tolist() == [20, 5, 5]
    assert len(set(chosen.tolist())) == 30
    assert balanced_sample(labels, 1000).tolist() == list(range(100))


def relative_mahalanobis(features, labels, given):
    """The definition: both covariances inverted, distances subtracted, in float64; with the ridge that ours has."""
    features, given = features.astype(np.float64), given.astype(np.float64)
    classes = np.unique(labels)
    means = np.stack([features[labels == k].mean(0) for k in classes])
    within, total = features - means[np.searchsorted(classes, labels)], features - features.mean(0)
    ridge = 1e-6 * total.var(0).mean() * np.eye(features.shape[1])
    inner, outer = (np.linalg.inv(part.T @ part / len(features) + ridge) for part in (within, total))
    of_classes = np.stack([np.einsum("nd,de,ne->n", given - m, inner, given - m) for m in means])
    background = np.einsum("nd,de,ne->n", given - features.mean(0), outer, given - features.mean(0))
    return (of_classes - background).min(0)


@pytest.mark.parametrize("networks", [1, 3])
def test_relative_mahalanobis_equals_its_definition(networks):
    training = toy(networks)
    features, _ = strangers(training)
    wanted = [
        relative_mahalanobis(bank, training.labels, given)
        for bank, given in zip(training.features, features, strict=True)
    ]
    got = RelativeMahalanobis.fit(training)(answers(features=features)).numpy()
    assert np.allclose(got, np.mean(wanted, 0), rtol=1e-4, atol=1e-3)
    assert got.mean() > RelativeMahalanobis.fit(training)(answers(features=training.features)).mean()


def test_relative_mahalanobis_is_stable_where_the_distances_cancel():
    """A feature that hardly varies within training blows both distances up, and leaves their difference alone."""
    training = toy()
    random = np.random.default_rng(2)
    still = 1e-2 * random.normal(size=(1, 600, 1)).astype(np.float32)
    wider = TrainingFeatures(
        np.concatenate([training.features, still], 2), training.labels, training.logits, None, None
    )
    features, _ = strangers(training)
    far = np.concatenate([features, np.full((1, 40, 1), 50, np.float32)], 2)
    got = RelativeMahalanobis.fit(wider)(answers(features=far)).numpy()
    assert np.allclose(got, relative_mahalanobis(wider.features[0], wider.labels, far[0]), rtol=1e-3)
    dead = TrainingFeatures(
        np.concatenate([training.features, 0 * still], 2), training.labels, training.logits, None, None
    )
    alive = RelativeMahalanobis.fit(training)(answers(features=features))
    assert torch.allclose(RelativeMahalanobis.fit(dead)(answers(features=far)), alive, rtol=1e-3, atol=1e-3)


def test_relative_mahalanobis_ignores_an_invertible_map_of_the_features():
    training = toy()
    features, _ = strangers(training)
    mapping = np.random.default_rng(3).normal(size=(12, 12)).astype(np.float32)
    mapped = TrainingFeatures(training.features @ mapping, training.labels, training.logits, None, None)
    a = RelativeMahalanobis.fit(training)(answers(features=features))
    b = RelativeMahalanobis.fit(mapped)(answers(features=features @ mapping))
    assert torch.allclose(a, b, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("networks", [1, 2])
def test_vim_equals_its_definition(networks):
    training = toy(networks)
    features, logits = strangers(training)
    residuals = []
    for bank, given, weight, bias in zip(training.features, features, training.weight, training.bias, strict=True):
        origin = -np.linalg.pinv(weight) @ bias
        _, _, axes = np.linalg.svd(bank - origin, full_matrices=False)
        norms = [np.linalg.norm((part - origin) @ axes[6:].T, axis=1) for part in (bank, given)]
        residuals.append(training.logits.max(1).mean() / norms[0].mean() * norms[1])
    wanted = np.mean(residuals, 0) - logsumexp(logits.mean(0), axis=1)
    fitted = ViM.fit(training)
    assert np.allclose(fitted(answers(logits=logits, features=features)).numpy(), wanted, rtol=1e-3, atol=1e-3)
    assert fitted.options == {"dimension": 6}
    assert ViM.fit(training, {"dimension": 11}).residual.shape == (networks, 12, 1)


def test_feature_scores_equal_pytorch_ood():
    detector = pytest.importorskip("pytorch_ood.detector")
    training = toy()
    features, logits = strangers(training)
    bank, labels = torch.from_numpy(training.features[0]), torch.from_numpy(training.labels)
    given, asked = torch.from_numpy(features[0]), answers(logits=logits, features=features)
    knn = detector.KNN(None, k=3).fit_features(bank, labels).predict_features(given)
    assert np.allclose((2 * KNN.fit(training, {"bank": 600, "neighbours": 3})(asked)).sqrt(), knn, atol=1e-5)
    weight, bias = torch.from_numpy(training.weight[0]), torch.from_numpy(training.bias[0])
    vim = detector.ViM(None, d=6, w=weight, b=bias).fit_features(bank, labels).predict_features(given)
    assert np.allclose(ViM.fit(training)(asked), vim, rtol=1e-3)
    # Its covariances are sums over images, not means.
    rmd = detector.RMD(None).fit_features(bank, labels).predict_features(given)
    assert np.allclose(RelativeMahalanobis.fit(training)(asked) / 600, rmd, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SCORES.names)
def test_a_score_is_restored_from_its_tensors_and_options(name):
    training = toy(2)
    features, logits = strangers(training)
    given = answers(np.full((40, 5), 0.2, np.float32), logits, features)
    fitted = SCORES[name].fit(training)
    state = {f"ood_score.{key}": value for key, value in fitted.state_dict().items()}
    record = json.loads(json.dumps(fitted_record(fitted)))
    again = restore_fitted(SCORES, record, state, "ood_score.")
    assert torch.equal(fitted(given), again(given))
    assert again.options == fitted.options


def test_what_features_do_not_allow_is_refused():
    training = toy()
    one_class = TrainingFeatures(training.features, training.labels * 0, training.logits, None, None)
    flat = TrainingFeatures(training.features * 0, training.labels, training.logits, training.weight, training.bias * 0)
    for kind in (KNN, RelativeMahalanobis, ViM):
        with pytest.raises(UncertaintyError, match="train split"):
            kind.fit(None)
        with pytest.raises(UncertaintyError, match="before it was fitted"):
            kind()(answers(features=training.features))
    with pytest.raises(UncertaintyError, match="one class"):
        RelativeMahalanobis.fit(one_class)
    with pytest.raises(UncertaintyError, match="not linear"):
        ViM.fit(one_class)
    with pytest.raises(UncertaintyError, match="nothing is left over"):
        ViM.fit(flat)
    with pytest.raises(UncertaintyError, match="1 to 11"):
        ViM.fit(training, {"dimension": 12})
    with pytest.raises(UncertaintyError, match="holds 5 images"):
        KNN.fit(training, {"bank": 5, "neighbours": 6})
    with pytest.raises(UnknownNameError, match="did you mean 'neighbours'"):
        KNN.fit(training, {"neighbors": 5})
    with pytest.raises(InputError, match="0 or more"):
        KNN({"bank": -1})
    with pytest.raises(UncertaintyError, match="NaN"):
        TrainingFeatures(training.features * np.nan, training.labels, training.logits, None, None)


# From here on whole models.


def images(count, seed, signal=0.8):
    """Four classes told apart by which quarter is brighter, noisily."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    pixels = torch.randn(count, *SHAPE, generator=generator)
    for i, label in enumerate(labels.tolist()):
        pixels[i, :, (label // 2) * 4 : (label // 2) * 4 + 4, (label % 2) * 4 : (label % 2) * 4 + 4] += signal
    return TensorDataset(pixels, labels)


def foreign(count, seed, scale):
    return TensorDataset(
        torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed)) * scale, torch.zeros(count)
    )


@pytest.fixture(scope="module")
def parts():
    return cuq.Splits(
        train=images(160, 0), calibration=images(80, 1), test=images(80, 2), ood={"loud": foreign(40, 3, 3.0)},
        validation_ood={"louder": foreign(40, 4, 4.0), "grey": foreign(40, 5, 0.1)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def network(parts):
    torch.manual_seed(0)
    model = cuq.build_model("compress-uq:cnn", num_classes=CLASSES, input_shape=SHAPE, options={"widths": [8, 8]})
    return cuq.finetune(model, parts, epochs=3, lr=0.05).model


@pytest.fixture(scope="module")
def uncertain(network, parts):
    method = MCDropout(p=0.2, samples=4)
    origin = Origin(SHAPE, Cost(1, 10**12, 1)).of_data(parts)
    return cuq.calibrate(UncertainModel(method.fit(Trained((network,), origin)), method, origin), parts)


def test_auto_takes_the_best_mean_auroc_on_the_validation_sets(uncertain, parts):
    chosen = cuq.choose_scores(uncertain, parts, ood_score="auto")
    record = chosen.record["ood_score_choice"]
    assert set(record["auroc"]) == set(SCORES.names)
    assert record["left_out"] == {}
    assert record["in_distribution"] == "the calibration split, cross-fitted in two halves"
    logits, labels = uncertain.member_logits(parts.calibration.tensors[0]).numpy(), parts.calibration.tensors[1].numpy()
    halves = divide(labels, 2)
    assert chosen.ood_score.name == record["chosen"] == max(record["mean_auroc"], key=record["mean_auroc"].get)
    for name in ("entropy", record["chosen"]):
        named = cuq.choose_scores(uncertain, parts, ood_score=name)
        with torch.no_grad():
            inside = torch.empty(len(parts.calibration))
            for own, other in (halves, halves[::-1]):
                crossed = named.but(calibrator=Temperature.fit(logits[:, other], labels[other]))
                inside[own] = crossed(parts.calibration.tensors[0][own]).ood_score
            for set_name, dataset in parts.validation_ood.items():
                wanted = cuq.metrics.ood_auroc(inside, named(dataset.tensors[0]).ood_score)
                assert record["auroc"][name][set_name] == pytest.approx(wanted, abs=2e-3)
    assert uncertain.ood_score.name == "entropy"


def test_auto_leaves_out_what_the_model_cannot_give(network, parts):
    method, origin = MSP(), Origin(SHAPE).of_data(parts)
    single = UncertainModel(method.fit(Trained((network,), origin)), method, origin)
    without = cuq.Splits(calibration=parts.calibration, validation_ood=parts.validation_ood)
    record = cuq.choose_scores(single, without, ood_score="auto").record["ood_score_choice"]
    assert set(record["left_out"]) == {"mutual-information", "variance", "knn", "relative-mahalanobis", "vim"}
    assert record["left_out"]["knn"] == "no train split"
    with pytest.raises(UncertaintyError, match="the model has one"):
        cuq.choose_scores(single, parts, ood_score="variance")


def test_a_score_is_not_chosen_on_what_it_is_measured_on(uncertain, parts):
    def chosen(**sets):
        return cuq.choose_scores(uncertain, cuq.Splits(calibration=parts.calibration, **sets), ood_score="auto")

    with pytest.raises(DataError, match="--validation-ood"):
        chosen(ood=parts.ood)
    loud = parts.ood["loud"]
    same = TensorDataset(*(tensor.clone() for tensor in loud.tensors))
    for name, dataset in (
        ("loud", foreign(40, 9, 2.0)),
        ("other", loud),
        ("copy", same),
        ("part", Subset(loud, [3, 4])),
    ):
        with pytest.raises(DataError, match="share images"):
            chosen(ood=parts.ood, validation_ood={name: dataset})
    halves = {"ood": {"a": Subset(loud, range(20))}, "validation_ood": {"b": Subset(loud, range(20, 40))}}
    assert chosen(**halves).record["ood_score_choice"]["validation_sets"] == ["b"]


def test_names_and_splits_are_checked(uncertain, parts):
    with pytest.raises(UnknownNameError, match="did you mean 'energy'"):
        cuq.choose_scores(uncertain, parts, ood_score="enrgy")
    with pytest.raises(UnknownNameError, match="score 'auto'"):
        cuq.choose_scores(uncertain, parts, score="auto")
    with pytest.raises(DataError, match="'train'"):
        cuq.choose_scores(uncertain, cuq.Splits(test=parts.test), ood_score="knn")
    with pytest.raises(UnknownNameError):
        cuq.choose_scores(uncertain, parts, options={"knnn": {}})
    with pytest.raises(DataError, match="empty"):
        cuq.Splits(validation_ood={"none": TensorDataset(torch.zeros(0, *SHAPE), torch.zeros(0))})


def test_another_uncertainty_takes_the_acceptance_rule_away(uncertain, parts):
    accepting = cuq.decide(uncertain, parts, risk=0.6, coverage=0.7)
    kept = cuq.choose_scores(accepting, parts, ood_score="energy")
    assert (kept.acceptance is None, kept.sets is None, kept.ood_score.name) == (False, False, "energy")
    changed = cuq.choose_scores(accepting, parts, score="entropy")
    assert (changed.acceptance is None, changed.sets is None, changed.score.name) == (True, False, "entropy")
    assert set(changed.record) == {"sets"}


@pytest.mark.parametrize("name", SCORES.names)
def test_every_score_is_exported(name, uncertain, parts, tmp_path):
    model = cuq.choose_scores(uncertain, parts, score=name, ood_score=name)
    cuq.export_onnx(model, tmp_path / "m.onnx")
    batch = torch.cat([parts.test.tensors[0][:7], parts.ood["loud"].tensors[0][:7]])
    got = OnnxPredictor(tmp_path / "m.onnx")
    with torch.no_grad():
        wanted = model(batch)
    for field in ("ood_score", "uncertainty"):
        a, b = getattr(got(batch.numpy()), field), getattr(wanted, field).numpy()
        assert a.shape == (14,)
        assert a.dtype == np.float32
        assert np.allclose(a, b, atol=2e-4 * max(1, np.abs(b).max())), field
    assert (got.metadata["score"], got.metadata["ood_score"]) == (name, name)


def test_scores_of_several_networks_are_averaged(network, parts):
    origin = Origin(SHAPE, Cost(1, 10**12, 1)).of_data(parts)
    other = cuq.finetune(network, parts, epochs=1, seed=5).model
    head = Trained((network,), origin).head()

    def model(*networks):
        return UncertainModel(Networks(networks, head), MSP(), origin)

    batch = parts.ood["loud"].tensors[0]
    for name in ("knn", "relative-mahalanobis"):
        both, *each = (
            cuq.choose_scores(model(*networks), parts, ood_score=name)(batch).ood_score
            for networks in ((network, other), (network,), (other,))
        )
        assert torch.allclose(both, (each[0] + each[1]) / 2, rtol=1e-3, atol=1e-5), name


def test_convolutional_heads_have_a_linear_classifier_and_others_do_not(parts):
    def features(head, channels=8):
        torch.manual_seed(0)
        body = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), head, nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        origin = Origin(SHAPE).of_data(parts)
        model = UncertainModel(MSP().fit(Trained((body,), origin)), MSP(), origin)
        from compress_uq.choosing import training_features

        return training_features(model, parts.train)

    found = features(nn.Conv2d(8, CLASSES, 1))
    assert np.allclose(found.features[0] @ found.weight[0].T + found.bias[0], found.logits, atol=1e-4)
    assert features(nn.Conv2d(8, CLASSES, 1, bias=False)).bias.tolist() == [[0.0] * CLASSES]
    assert features(nn.Conv2d(8, CLASSES, 3)).weight is None


@pytest.mark.parametrize("behind", [nn.LogSoftmax(1), nn.ReLU()])
def test_vim_refuses_logits_that_are_not_linear_in_the_features(behind, parts):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(SHAPE)), 16), nn.ReLU(), nn.Linear(16, CLASSES), behind)
    origin = Origin(SHAPE).of_data(parts)
    model = UncertainModel(MSP().fit(Trained((body,), origin)), MSP(), origin)
    with pytest.raises(UncertaintyError, match="vim: the classifier is not linear"):
        cuq.choose_scores(model, parts, ood_score="vim")
    assert cuq.choose_scores(model, parts, ood_score="knn").ood_score.name == "knn"
