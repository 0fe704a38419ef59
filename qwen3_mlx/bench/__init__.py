"""Speed benchmarks of this package and mlx-lm."""
