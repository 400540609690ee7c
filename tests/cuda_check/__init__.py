"""What nvcc made of the CUDA kernels, read without a GPU: budgets, and a model of their speed."""
