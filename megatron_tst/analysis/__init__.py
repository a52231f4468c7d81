"""Runs side by side once they ended: curves, comparisons, verdicts, plots, sweeps."""
