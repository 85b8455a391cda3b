"""Adapters between msmri and its neighbours: DeepInverse, SigPy and fastMRI; each loads its library when called."""
