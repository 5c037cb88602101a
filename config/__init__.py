"""The options of a run: what there is, how it is given, what contradicts."""
