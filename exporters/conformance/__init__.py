"""Independent readers of exported files, each in a process of its own."""
