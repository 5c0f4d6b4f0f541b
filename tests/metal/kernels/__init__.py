"""Tests of the shipped Metal kernels on the emulator."""
