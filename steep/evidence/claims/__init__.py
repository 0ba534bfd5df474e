"""Claims of papers as experiments, what they gave, and what that says."""

from steep.evidence.claims.claim import Claim, Lab, Pairs, Quantity, columns, cpu_seconds, errors, scores

__all__ = ["Claim", "Lab", "Pairs", "Quantity", "columns", "cpu_seconds", "errors", "scores"]
