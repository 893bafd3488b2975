"""Numerics: how far one distribution is from another. Knows tensors; knows nothing of tiers, HTTP or files."""
