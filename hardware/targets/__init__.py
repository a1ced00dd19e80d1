"""Targets: limits as named constants, rules whose name is the rule."""
