"""What quantizing each layer or part of a model alone would cost: measured on the reference, in Transformers."""
