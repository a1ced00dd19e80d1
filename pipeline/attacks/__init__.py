"""Attacks in pixel codes: budgets are whole codes, and what is judged is what is returned."""
