"""Traces, as a real collector gets them."""
