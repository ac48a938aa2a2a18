"""One module for each way to name and describe published weights; `vit_dist.weights.published` lists them."""
