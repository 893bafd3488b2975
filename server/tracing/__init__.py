"""Traces: what one request took, from its caller's own trace to its engine's."""
