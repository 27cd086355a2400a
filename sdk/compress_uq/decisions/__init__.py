"""Decision rules: which answers to accept, and which classes to name."""

from compress_uq.decisions.base import AcceptanceRule, SetRule
from compress_uq.registry import Registry

__all__ = ["ACCEPTANCE_RULES", "SET_RULES", "AcceptanceRule", "SetRule"]

ACCEPTANCE_RULES: Registry[type[AcceptanceRule]] = Registry("acceptance rule")
SET_RULES: Registry[type[SetRule]] = Registry("set rule")
