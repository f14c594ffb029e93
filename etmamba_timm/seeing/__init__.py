"""Analysis and plots of models and their predictions."""
