"""Where arrays are, host memory or a GPU's, and what is missing to use one."""
