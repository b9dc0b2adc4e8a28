"""Model operations with a smaller memory footprint or faster kernels than their composition in torch."""
