"""Attacks behind one interface: the package's own, AutoAttack's components, torchattacks'."""

from robustflat.evaluate.attacks.base import Attack, Suite
from robustflat.evaluate.attacks.names import Request, plan

__all__ = ["Attack", "Request", "Suite", "plan"]
