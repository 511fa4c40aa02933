"""Data sets that X2L builds itself: recipes (``*.yaml``), their cards, and the recognisers that check spoken data."""
