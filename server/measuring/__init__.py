"""Measures tiers on their running engines, or on a server that someone else runs."""
