"""Kernels and the tensors they work on: the contract, its plain torch fulfillment, the paged KV and a step's inputs."""
