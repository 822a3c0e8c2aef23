"""What the kernels do on a GPU: are they right, which tiles are best, how fast are they and the models on them."""
