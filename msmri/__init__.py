"""msmri: MRI reconstruction with diffusion models that were never shown a clean image."""

__version__ = "0.1.0"
