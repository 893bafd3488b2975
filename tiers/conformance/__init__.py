"""How far a tier's distributions are from the reference's, and on what it is measured."""
