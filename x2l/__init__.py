"""X2L: treat any modality as a foreign language for any LLM."""

import os

__version__ = "0.1.0"

# onnxruntime, which some encoders and voices run on, reports to its maker from the import on unless this is set.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
