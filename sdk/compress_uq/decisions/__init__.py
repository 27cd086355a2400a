"""Decision rules: which answers to accept, and which classes to name."""

from compress_uq.decisions.base import AcceptanceRule, Rule, SetRule
from compress_uq.decisions.conformal import LAC, RAPS, check_coverage, conformal_rank
from compress_uq.decisions.sgr import SGR, binomial_bound, check_risk, smallest_risk
from compress_uq.registry import Entry, Registry

__all__ = [
    "ACCEPTANCE_RULES",
    "LAC",
    "RAPS",
    "SET_RULES",
    "SGR",
    "AcceptanceRule",
    "Rule",
    "SetRule",
    "binomial_bound",
    "check_coverage",
    "check_risk",
    "conformal_rank",
    "smallest_risk",
]

ACCEPTANCE_RULES: Registry[type[AcceptanceRule]] = Registry(
    "acceptance rule",
    Entry("sgr", "accepts as much as it can within a certified risk", "Geifman 2017, algorithm 2", SGR),
)
SET_RULES: Registry[type[SetRule]] = Registry(
    "set rule",
    Entry("lac", "classes above a threshold; the smallest sets on average", "Sadinle 2019", LAC),
    Entry("raps", "most probable classes up to a sum, late ones penalised", "Angelopoulos 2021", RAPS),
)
