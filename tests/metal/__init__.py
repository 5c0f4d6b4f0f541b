"""Metal kernels on a CPU: translation, SIMT emulation, checks. See README.md."""
