"""Serves a bundle over HTTP, on any runtime; the extra ``serve`` brings what it needs, and that is no torch."""
