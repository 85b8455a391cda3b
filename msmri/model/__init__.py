"""Denoisers, the networks inside them, and the files they are kept in."""
