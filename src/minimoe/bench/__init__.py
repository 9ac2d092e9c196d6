"""Measuring on the reader's own machine."""
