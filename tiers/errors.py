"""What can go wrong before a tier runs. Each error is one sentence that says what, where, and what to do."""


class AssayError(Exception):
    """The root of every error that Assay explains itself; the command line prints its sentence and exits 1."""


class ConfigError(AssayError):
    """The configuration cannot mean anything; the sentence has the file, the field and what is accepted."""


class SourceError(AssayError):
    """The source weights cannot be had, or are of an architecture Assay does not serve."""


class CheckpointError(AssayError):
    """A checkpoint is missing, unfinished or not what its manifest says."""


class BuildError(AssayError):
    """A checkpoint could not be built; nothing that looks finished was left behind."""


class PlacementError(AssayError):
    """The engines do not fit on this machine's memory or GPUs."""


class PromptsError(AssayError):
    """The prompts that tiers are measured on are not what they should be; the sentence has file and prompt."""


class CertificateError(AssayError):
    """A certificate, its signature or a key of it is not what it should be."""


class OperatorsError(AssayError):
    """The engine's operators could not be run beside their definitions."""
