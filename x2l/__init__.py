"""X2L: treat any modality as a foreign language for any LLM."""

__version__ = "0.1.0"
