"""The checker's own score: planted deployment errors that a fidelity check must catch, and false alarms."""
