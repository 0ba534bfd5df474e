"""Claims of papers as experiments, their outcomes, and the verdicts on them."""

from steep.evidence.claims.claim import Claim, Lab, Pairs, Quantity, columns, cpu_seconds, errors, scores

__all__ = ["Claim", "Lab", "Pairs", "Quantity", "columns", "cpu_seconds", "errors", "scores"]
