"""Triton kernels. Imported only where they run: PyTorch for CPUs comes without Triton.

The modules beside this package say what each computes, and hold the same in plain PyTorch for other devices.
"""
