"""Parts of `recipes.gpu_check`: its sections, the process that runs one of them, and the process that starts those."""
