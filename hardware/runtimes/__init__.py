"""Runtimes: everything that can run a deployed network, behind one protocol."""
