"""The commands of `assay`, one a module, and where they print."""
