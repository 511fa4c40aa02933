"""Transforms of data sets: a pure function rows -> rows with a version, run by a resumable, parallel runner."""
