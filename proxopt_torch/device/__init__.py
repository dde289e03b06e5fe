"""Fast steps on CUDA devices: an eager prox that never waits for the device, and Triton kernels (``triton_steps``)."""
