"""The part of Assay that is loaded inside a vLLM engine."""
