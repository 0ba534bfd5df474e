"""Common checks that every method must pass: ours and anybody's."""

from steep.testing.methods import check_method, checks, has_compiler, tiny_recipe

__all__ = ["check_method", "checks", "has_compiler", "tiny_recipe"]
