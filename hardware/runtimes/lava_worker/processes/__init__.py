"""Lava processes of our own. Lava's compiler executes every file beside the one that defines a process."""
