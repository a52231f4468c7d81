"""Compares finished runs: curves, claims, verdicts, plots and sweeps."""
