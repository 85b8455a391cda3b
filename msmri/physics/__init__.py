"""The physics of a measurement: Fourier transform, operators, masks, coils, solvers, simulation."""
