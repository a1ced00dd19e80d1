"""Errors of exporters and runtimes, planted on purpose: a check that does not find them is worth nothing.

A wrong deployment is a network that differs from the one that was meant; a wrong runtime computes the right network
wrongly. Either goes wrong in the damaged population first, so a comparison has to name that one.
"""
