"""How far a running tier is from the reference: measured, judged, certified."""
