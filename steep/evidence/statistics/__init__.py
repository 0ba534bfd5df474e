"""Exact tests and intervals for paired runs, their power, and interim analyses."""
