"""What a run will take before it starts: memory, time, data, and the layouts that fit."""
