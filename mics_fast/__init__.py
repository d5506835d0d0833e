"""Semi-supervised classification of paired medical images (MICS, arXiv 2509.17492)."""
