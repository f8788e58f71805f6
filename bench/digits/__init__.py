"""A small vision transformer on scikit-learn's digits: its model, its training, and its weights for three seeds."""
