"""A model on disk: which of its weights a name means, tied weights, the view that was trained, the files beside the weights."""
