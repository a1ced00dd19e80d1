"""Data sets as 8-bit pixel codes, split once with a fixed seed. Nothing is read before a loader is called."""

from pipeline.data.dataset import Dataset, Splits, digest_of
from pipeline.data.digits import load_digits
from pipeline.data.npz import load_npz
from pipeline.data.splitting import split, split_official

__all__ = ["Dataset", "Splits", "digest_of", "load_digits", "load_npz", "split", "split_official"]
