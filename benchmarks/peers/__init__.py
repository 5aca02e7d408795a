"""The systems that `benchmarks/cpu_step.py` compares; a module runs in processes of its own."""
