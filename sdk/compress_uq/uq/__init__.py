"""Uncertainty methods: each a configuration that turns a network into members."""

from compress_uq.registry import Entry, Registry
from compress_uq.uq.base import Method, Trained
from compress_uq.uq.dropout import SampledDropout
from compress_uq.uq.dropout_training import DropoutNetwork
from compress_uq.uq.ensemble import Ensemble
from compress_uq.uq.gaussian import GaussianPerturbation
from compress_uq.uq.laplace import Laplace
from compress_uq.uq.mask_ensemble import MaskEnsemble
from compress_uq.uq.mc_dropout import DropoutPlan, MCDropout
from compress_uq.uq.members import Fidelity, Members, Networks, SingleMember
from compress_uq.uq.msp import MSP
from compress_uq.uq.sites import Site, find_sites
from compress_uq.uq.swag import SWAG
from compress_uq.uq.tradi import TRADI

__all__ = [
    "METHODS",
    "MSP",
    "SWAG",
    "TRADI",
    "DropoutNetwork",
    "DropoutPlan",
    "Ensemble",
    "GaussianPerturbation",
    "Laplace",
    "Fidelity",
    "MCDropout",
    "MaskEnsemble",
    "Members",
    "Method",
    "Networks",
    "SampledDropout",
    "SingleMember",
    "Site",
    "Trained",
    "find_sites",
]

METHODS: Registry[type[Method]] = Registry(
    "uncertainty method",
    Entry("msp", "one pass, maximum softmax probability", "Hendrycks 2017", MSP),
    Entry("mc-dropout", "several passes with parts dropped, the trunk shared", "Gal 2016, section 3", MCDropout),
    Entry("ensemble", "several networks, trained and pruned apart", "Lakshminarayanan 2017", Ensemble),
    Entry(
        "tradi", "weights drawn from Gaussians tracked by Kalman filters in training", "Franchi 2020, section 3", TRADI
    ),
    Entry("swag", "weights drawn from a Gaussian of a training's last weights", "Maddox 2019, section 3", SWAG),
    Entry(
        "gaussian", "weights of a trained network with noise on them", "Franchi 2020, section 4", GaussianPerturbation
    ),
    Entry("laplace", "a Gaussian over the classifier's weights, in one pass", "Ritter 2018; Kristiadi 2020", Laplace),
    Entry("mask-ensemble", "a few fixed masks, each trained in as a member", "Durasov 2021, section 3", MaskEnsemble),
)
