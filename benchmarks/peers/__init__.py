"""The systems beside this project; a module runs in processes of its own."""
