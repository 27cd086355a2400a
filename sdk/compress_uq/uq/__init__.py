"""Uncertainty methods: each a configuration that turns a network into members."""

from compress_uq.registry import Entry, Registry
from compress_uq.uq.base import Method, Trained
from compress_uq.uq.dropout import SampledDropout
from compress_uq.uq.dropout_training import DropoutNetwork
from compress_uq.uq.mask_ensemble import MaskEnsemble
from compress_uq.uq.mc_dropout import DropoutPlan, MCDropout
from compress_uq.uq.members import Fidelity, Members, Networks, SingleMember
from compress_uq.uq.msp import MSP
from compress_uq.uq.sites import Site, find_sites

__all__ = [
    "METHODS",
    "MSP",
    "DropoutNetwork",
    "DropoutPlan",
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
    Entry("mask-ensemble", "a few fixed masks, each trained in as a member", "Durasov 2021, section 3", MaskEnsemble),
)
