"""Estimates the memory, time and data of a run before it starts, and the parallel layouts that fit."""
