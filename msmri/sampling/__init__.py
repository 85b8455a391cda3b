"""Reverse diffusion: ladders of noise levels, the one sampling loop, and estimates corrected by measurements."""
